"""Images of any size -> `pixel_values` of a SaviModel."""

import numpy as np
import torch
import torch.nn.functional as F

from ..images import RgbImageProcessor


class SaviImageProcessor(RgbImageProcessor):
    r"""
    Scales RGB images to [-1, 1] and resizes them bilinearly, anti-aliased, as SlotFormer's transforms do; see
    [`RgbImageProcessor`] for what they may be.

    Args:
        size (`int`, defaults to 64): Height and width of the result. Images that are not square are squeezed.
    """

    def __init__(self, size: int = 64, **kwargs):
        super().__init__(size, **kwargs)

    def _resize(self, frames: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
        pixels = pixels.float().div(255) if frames.dtype == np.uint8 else pixels
        pixels = (pixels - 0.5) / 0.5  # before resizing, as SlotFormer
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(
                pixels, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False
            )
        return pixels.contiguous().numpy()


__all__ = ["SaviImageProcessor"]
