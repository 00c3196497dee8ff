"""Frames of any size -> `pixel_values` of a VideoSaurModel."""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature

_WANT = "expected RGB: a PIL image, uint8 [H, W, 3], frames [T, H, W, 3], or a list of these"
_CHUNK = 32  # frames resized at once


class VideoSaurImageProcessor(BaseImageProcessor):
    r"""
    Resizes RGB frames and normalizes them with the mean and deviation of ImageNet. The defaults are what the released
    encoders extract slots with; `resample="bicubic", antialias=False` is what they were trained with.

    Args:
        size (`int`, defaults to 196): Height and width of the result.
        resample (`"bilinear"` or `"bicubic"`, defaults to `"bilinear"`): Interpolation; results are clamped to [0, 1].
        antialias (`bool`, defaults to `True`): Average over the pixels that shrink into one.
        center_crop (`bool`, defaults to `False`): Resize the shorter side to `size` and cut out the center; `False`
            squeezes images that are not square.
        image_mean, image_std (three `float`, default to ImageNet's): `(RGB in [0, 1] - mean) / std`.

    Images: PIL images, numpy arrays or CPU tensors, [H, W, 3] or [T, H, W, 3], uint8 in 0-255 or float in [0, 1], any
    size; or lists of them. The result's `pixel_values` is float32 [B, 3, size, size] for images (B = 1 for one image,
    B = T for one array of frames) and [B, T, 3, size, size], what the model takes, for a list of equally long clips.

    Raises `ValueError` for gray or RGBA images, channels first, or float images that are not in [0, 1].
    """

    model_input_names = ["pixel_values"]

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
        super().__init__(**kwargs)
        if isinstance(size, dict):
            size = size.get("height")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size={size!r} must be a positive number of pixels.")
        if resample not in ("bilinear", "bicubic"):
            raise ValueError(f"resample={resample!r} must be 'bilinear' or 'bicubic'.")
        if len(image_mean) != 3 or len(image_std) != 3 or min(image_std) <= 0:
            raise ValueError(f"image_mean={image_mean} and image_std={image_std} must be three numbers, std positive.")
        self.size, self.resample, self.antialias, self.center_crop = size, resample, antialias, center_crop
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def preprocess(self, images, return_tensors: str | None = "pt", **kwargs) -> BatchFeature:
        """See the class. `return_tensors` is "pt" (default) or "np"."""
        if kwargs:
            raise ValueError(
                f"Unknown options {sorted(kwargs)}; VideoSaurImageProcessor takes images, return_tensors."
            )
        if isinstance(images, list | tuple):
            if not images:
                raise ValueError(f"No images given; {_WANT}.")
            clips = [self._to_array(image) for image in images]
            if len({clip.ndim for clip in clips}) > 1 or (clips[0].ndim == 4 and len({len(c) for c in clips}) > 1):
                shapes = [clip.shape for clip in clips[:4]]
                raise ValueError(f"Images or clips of different lengths in one list: {shapes}. Give them separately.")
            pixels = torch.stack([self._resize(clip) for clip in clips])
        else:
            array = self._to_array(images)
            pixels = self._resize(array if array.ndim == 4 else array[None])
        return BatchFeature({"pixel_values": pixels.numpy()}, tensor_type=return_tensors)

    def _to_array(self, image) -> np.ndarray:
        if isinstance(image, Image.Image):
            if image.mode != "RGB":
                raise ValueError(f'PIL image of mode {image.mode!r}; {_WANT}. Use image.convert("RGB").')
            return np.asarray(image)
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu().numpy()
        if not isinstance(image, np.ndarray):
            raise ValueError(f"Image of type {type(image).__name__}; {_WANT}.")
        shape = image.shape
        if image.ndim not in (3, 4) or shape[-1] != 3:
            if image.ndim in (3, 4) and shape[-3] == 3:
                raise ValueError(f"Image of shape {shape} has its channels first; {_WANT}. Move axis -3 to the end.")
            if image.ndim in (3, 4) and shape[-1] == 4:
                raise ValueError(f"Image of shape {shape} has 4 channels (RGBA?); {_WANT}. Drop the alpha channel.")
            if image.ndim == 2 or shape[-1:] == (1,):
                raise ValueError(f"Image of shape {shape} is gray; {_WANT}. Repeat the channel three times.")
            raise ValueError(f"Image of shape {shape}; {_WANT}.")
        if 0 in shape:
            raise ValueError(f"Image of shape {shape} is empty; {_WANT}.")
        if image.dtype == np.uint8:
            return image
        if not np.issubdtype(image.dtype, np.floating):
            raise ValueError(f"Image of dtype {image.dtype}; {_WANT}. Convert with .astype(numpy.uint8).")
        if not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(
                f"Float image with values from {image.min():.4g} to {image.max():.4g}; floats must be in [0, 1]. "
                "Convert 0-255 images to uint8."
            )
        return image.astype(np.float32)

    def _resize(self, array: np.ndarray) -> torch.Tensor:
        """[(T,) H, W, 3] -> float32 [(T,) 3, size, size]."""
        frames = np.ascontiguousarray(array.reshape(-1, *array.shape[-3:]))
        pixels = torch.empty(len(frames), 3, self.size, self.size)
        for start in range(0, len(frames), _CHUNK):
            pixels[start : start + _CHUNK] = self._resize_chunk(frames[start : start + _CHUNK])
        return pixels.view(*array.shape[:-3], *pixels.shape[1:])

    def _resize_chunk(self, frames: np.ndarray) -> torch.Tensor:
        if not frames.flags.writeable:  # of a PIL image; from_numpy warns
            frames = frames.copy()
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
