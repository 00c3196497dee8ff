"""Loads weights and outputs of the released code (small excerpts in tests/data) into our model."""

import re
from pathlib import Path

import torch
from safetensors import safe_open

from cjepa_hf import CJepaConfig, CJepaModel

DATA = Path(__file__).parents[1] / "data"

_RENAMES = [
    (r"^time_pos_embed$", "predictor.time_embedding"),
    (r"^mask_token$", "predictor.mask_token"),
    (r"^id_projector\.", "predictor.anchor_projection."),
    (r"^transformer\.norm\.", "predictor.norm."),
    (r"^transformer\.layers\.(\d+)\.0\.in_proj_(weight|bias)$", r"predictor.layers.\1.attention.qkv.\2"),
    (r"^transformer\.layers\.(\d+)\.0\.out_proj\.", r"predictor.layers.\1.attention.out_proj."),
    (r"^transformer\.layers\.(\d+)\.1\.0\.", r"predictor.layers.\1.mlp.norm."),
    (r"^transformer\.layers\.(\d+)\.1\.1\.", r"predictor.layers.\1.mlp.fc1."),
    (r"^transformer\.layers\.(\d+)\.1\.4\.", r"predictor.layers.\1.mlp.fc2."),
    (r"^to_out\.", "predictor.head."),
    (r"^(action|proprio)_encoder\.patch_embed\.", r"\1_embedding."),
]


def read(name: str) -> dict[str, torch.Tensor]:
    with safe_open(DATA / name, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def original_key(key: str) -> str:
    """Our name of a parameter of the released code (with or without its `predictor.` prefix)."""
    key = key.removeprefix("predictor.")
    for pattern, replacement in _RENAMES:
        key, found = re.subn(pattern, replacement, key)
        if found:
            return key
    raise KeyError(key)


def load_original_state_dict(model: CJepaModel, tensors: dict[str, torch.Tensor]) -> None:
    """Copies the `weights.*` entries of an excerpt; every parameter of the model must be among them."""
    state = {}
    for key, value in tensors.items():
        if key.startswith("weights.") and "initializer" not in key:
            name = original_key(key.removeprefix("weights."))
            state[name] = value.float().reshape(model.get_parameter(name).shape)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith(("_mean", "_std")) for key in missing), (missing, unexpected)


def golden_model(tensors: dict[str, torch.Tensor], **config) -> CJepaModel:
    model = CJepaModel(CJepaConfig(**config)).eval()
    load_original_state_dict(model, tensors)
    return model
