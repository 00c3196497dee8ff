"""A folder of a model, checked before it is published: it loads, from safetensors, whole and without NaN."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, PreTrainedModel

__all__ = ["checked_model"]


def checked_model(folder: str | os.PathLike) -> PreTrainedModel:
    """The model in `folder` (of `save_pretrained`), in eval mode, if its weights are whole, finite and fit its config.json.

    Buffers may hold NaN: statistics that are not known.

    Raises:
        ValueError: there is no safetensors file, it is damaged or does not fit, or a parameter holds NaN or infinity.
    """
    folder = Path(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder} holds no model.safetensors: save the model with save_pretrained")
    for path in weights:
        try:
            with safe_open(path, "pt") as file:
                file.keys()
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): copy or save it again") from None
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    try:
        model, problems = AutoModel.from_pretrained(
            folder, config=config, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except RuntimeError as error:  # shapes
        raise ValueError(f"the weights in {folder} do not fit its config.json: {error}") from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, problems[problem])):
            raise ValueError(
                f"the weights in {folder} do not fit its config.json: {len(names)} {problem.replace('_', ' ')}, "
                f"{names[0]} first. Save config and weights together (save_pretrained)"
            )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(
                f"parameter {name} in {folder} holds NaN or infinity: the training diverged or it is damaged"
            )
    return model
