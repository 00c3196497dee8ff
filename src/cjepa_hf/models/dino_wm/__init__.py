"""The autoregressive baselines of the paper: DINO-WM over patch tokens, OC-DINO-WM over slots."""

from .configuration_dino_wm import DinoWmConfig, PatchEncoderConfig
from .modeling_dino_wm import DinoWmModel, DinoWmOutput, PatchEncoderModel, PatchEncoderOutput

__all__ = [
    "DinoWmConfig",
    "DinoWmModel",
    "DinoWmOutput",
    "PatchEncoderConfig",
    "PatchEncoderModel",
    "PatchEncoderOutput",
]
