"""Frames of any size -> `pixel_values` of a VideoSaurModel."""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from ..images import RgbImageProcessor

_CHUNK = 32  # frames resized at once


class VideoSaurImageProcessor(RgbImageProcessor):
    r"""
    Resizes RGB frames and normalizes them with the mean and deviation of ImageNet. The defaults are what the released
    encoders extract slots with; `resample="bicubic", antialias=False` is what they were trained with. See
    [`RgbImageProcessor`] for what frames may be; the model takes the result of a list of clips.

    Args:
        size (`int`, defaults to 196): Height and width of the result.
        resample (`"bilinear"` or `"bicubic"`, defaults to `"bilinear"`): Interpolation; results are clamped to [0, 1].
        antialias (`bool`, defaults to `True`): Average over the pixels that shrink into one.
        center_crop (`bool`, defaults to `False`): Resize the shorter side to `size` and cut out the center; `False`
            squeezes images that are not square.
        image_mean, image_std (three `float`, default to ImageNet's): `(RGB in [0, 1] - mean) / std`.
    """

    def __init__(
        self,
        size: int = 196,
        resample: Literal["bilinear", "bicubic"] = "bilinear",
        antialias: bool = True,
        center_crop: bool = False,
        image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        image_std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        **kwargs,
    ):
        super().__init__(size, **kwargs)
        if resample not in ("bilinear", "bicubic"):
            raise ValueError(f"resample={resample!r} must be 'bilinear' or 'bicubic'.")
        if len(image_mean) != 3 or len(image_std) != 3 or min(image_std) <= 0:
            raise ValueError(f"image_mean={image_mean} and image_std={image_std} must be three numbers, std positive.")
        self.resample, self.antialias, self.center_crop = resample, antialias, center_crop
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def _resize(self, frames: np.ndarray) -> np.ndarray:
        pixels = torch.empty(len(frames), 3, self.size, self.size)
        for start in range(0, len(frames), _CHUNK):
            pixels[start : start + _CHUNK] = self._resize_chunk(frames[start : start + _CHUNK])
        return pixels.numpy()

    def _resize_chunk(self, frames: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().float()
        if frames.dtype == np.uint8:
            pixels /= 255
        height, width = pixels.shape[-2:]
        target = (self.size, self.size)
        if self.center_crop:
            short = min(height, width)
            target = (self.size * height // short, self.size * width // short)
        if (height, width) != target:
            pixels = F.interpolate(pixels, size=target, mode=self.resample, antialias=self.antialias).clamp_(0, 1)
        top, left = (round((side - self.size) / 2) for side in target)
        pixels = pixels[..., top : top + self.size, left : left + self.size]
        mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (self.image_mean, self.image_std))
        return (pixels - mean) / std


__all__ = ["VideoSaurImageProcessor"]
