"""Loads weights and outputs of the released VideoSAUR (small excerpts in tests/data) into our model."""

import re

import torch

from cjepa_hf.models.videosaur import VideoSaurModel

# original name -> ours, of the whole model or of one of its parts
_RENAMES = [
    (r"^encoder\.module\.backbone\.", "backbone."),
    (r"^(.*)\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r"\1.attention.\2_proj."),  # transformers 4 -> 5
    (r"^(.*)\.attention\.output\.dense\.", r"\1.attention.o_proj."),
    (r"^encoder\.module\.|^processor\.module\.|^decoder\.module\.(?=\w)", ""),
    (r"(^|\.)layers\.0\.(?=weight|bias)", r"\1norm."),
    (r"(^|\.)layers\.1\.(?=weight|bias)", r"\1fc1."),
    (r"(^|\.)layers\.3\.(?=weight|bias)", r"\1fc2."),
    (r"(^|\.)norm_(feature|slot)s\.", r"\1\2_norm."),
    (r"(^|\.)norm_q\.", r"\1query_norm."),
    (r"(^|\.)norm_k\.", r"\1key_norm."),
    (r"(^|\.)norm_memory\.", r"\1memory_norm."),
    (r"(^|\.)to_q\.", r"\1query."),
    (r"(^|\.)to_k\.", r"\1key."),
    (r"(^|\.)to_v\.", r"\1value."),
    (r"(^|\.)blocks\.", r"\1layers."),
    (r"\.self_attn\.kv\.", ".attention.key_value."),
    (r"\.self_attn\.q\.", ".attention.query."),
    (r"\.self_attn\.", ".attention."),
    (r"\.linear([12])\.", r".fc\1."),
    (r"\.scale([12])\.gamma$", r".scale\1"),
    (r"^pos_emb$", "position_embedding"),
]


def original_key(key: str) -> str:
    """Our name of a parameter of the released code."""
    decoder = key.startswith("decoder.module.")
    if decoder:
        key = key.removeprefix("decoder.module.")
        key = re.sub(r"^renderer\.layers\.(\d)", lambda m: f"renderer.{int(m[1]) // 2}", key)
        key = re.sub(r"^output_transform\.", "head.", key)
    backbone = key.startswith("encoder.module.backbone.")
    for pattern, replacement in _RENAMES[:3] if backbone else _RENAMES[3:]:
        key = re.sub(pattern, replacement, key)
    return f"decoder.{key}" if decoder else key


def load_original_state_dict(module: torch.nn.Module, tensors: dict[str, torch.Tensor], prefix: str = "weights."):
    """Copies the weights of an excerpt; every parameter of the module must be among them."""
    state = {original_key(k.removeprefix(prefix)): v.float() for k, v in tensors.items() if k.startswith(prefix)}
    module.load_state_dict(state)


def slots_model(model: VideoSaurModel, tensors: dict[str, torch.Tensor]) -> VideoSaurModel:
    """As `load_original_state_dict`, for an excerpt without decoder."""
    state = {
        original_key(k.removeprefix("weights.")): v.float() for k, v in tensors.items() if k.startswith("weights.")
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(key.startswith("decoder.") for key in missing), (missing, unexpected)
    return model
