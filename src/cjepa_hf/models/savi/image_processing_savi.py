"""Images of any size -> `pixel_values` of a SaviModel."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature

_WANT = "expected RGB: a PIL image, uint8 [H, W, 3], frames [T, H, W, 3], or a list of these"


class SaviImageProcessor(BaseImageProcessor):
    r"""
    Scales RGB images to [-1, 1] and resizes them bilinearly, anti-aliased, as SlotFormer's transforms do.

    Args:
        size (`int`, defaults to 64): Height and width of the result. Images that are not square are squeezed.

    Images: PIL images, numpy arrays or CPU tensors, [H, W, 3] or [T, H, W, 3], uint8 in 0-255 or float in [0, 1], any
    size; or lists of them. The result's `pixel_values` is float32 [B, 3, size, size] for images (B = 1 for one image,
    B = T for one array of frames) and [B, T, 3, size, size] for a list of equally long clips.

    Raises `ValueError` for gray or RGBA images, channels first, or float images that are not in [0, 1].
    """

    model_input_names = ["pixel_values"]

    def __init__(self, size: int = 64, **kwargs):
        super().__init__(**kwargs)
        if isinstance(size, dict):
            size = size.get("height")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size={size!r} must be a positive number of pixels.")
        self.size = size

    def preprocess(self, images, return_tensors: str | None = "pt", **kwargs) -> BatchFeature:
        """See the class. `return_tensors` is "pt" (default) or "np"."""
        if kwargs:
            raise ValueError(f"Unknown options {sorted(kwargs)}; SaviImageProcessor takes images, return_tensors.")
        if isinstance(images, list | tuple):
            if not images:
                raise ValueError(f"No images given; {_WANT}.")
            clips = [self._to_tensor(image) for image in images]
            if len({clip.ndim for clip in clips}) > 1 or (clips[0].ndim == 4 and len({len(c) for c in clips}) > 1):
                shapes = [tuple(clip.shape) for clip in clips[:4]]
                raise ValueError(f"Images or clips of different lengths in one list: {shapes}. Give them separately.")
            if len({clip.shape for clip in clips}) == 1:
                pixels = self._resize(torch.stack(clips))
            else:
                pixels = torch.stack([self._resize(clip) for clip in clips])
        else:
            frames = self._to_tensor(images)
            pixels = self._resize(frames if frames.ndim == 4 else frames[None])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def _to_tensor(self, image) -> torch.Tensor:
        """-> [(T,) H, W, 3], uint8 or float."""
        if isinstance(image, Image.Image):
            if image.mode != "RGB":
                raise ValueError(f'PIL image of mode {image.mode!r}; {_WANT}. Use image.convert("RGB").')
            image = np.asarray(image)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
                raise ValueError(f"Image of dtype {image.dtype}; {_WANT}. Convert with .astype(numpy.uint8).")
            image = torch.from_numpy(np.array(image, copy=not image.flags.writeable))
        if not isinstance(image, torch.Tensor):
            raise ValueError(f"Image of type {type(image).__name__}; {_WANT}.")
        shape = tuple(image.shape)
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
        if image.dtype == torch.uint8:
            return image.detach().cpu()
        if not image.is_floating_point():
            raise ValueError(f"Image of dtype {image.dtype}; {_WANT}. Convert it to uint8.")
        low, high = (float(v) for v in image.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"Float image with values from {low:.4g} to {high:.4g}; floats must be in [0, 1]. Convert 0-255 images "
                "to uint8."
            )
        return image.detach().cpu()

    def _resize(self, frames: torch.Tensor) -> torch.Tensor:
        """[..., H, W, 3] -> float32 [..., 3, size, size]."""
        pixels = frames.reshape(-1, *frames.shape[-3:]).permute(0, 3, 1, 2)
        pixels = pixels.float().div(255) if frames.dtype == torch.uint8 else pixels.float()
        pixels = (pixels - 0.5) / 0.5  # before resizing, as SlotFormer
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(
                pixels, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False
            )
        return pixels.contiguous().view(*frames.shape[:-3], 3, self.size, self.size)


__all__ = ["SaviImageProcessor"]
