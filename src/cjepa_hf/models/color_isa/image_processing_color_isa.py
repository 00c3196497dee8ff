"""Images of any size -> `pixel_values` of a ColorIsaModel."""

import cv2
import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature

_WANT = "expected RGB: a PIL image, uint8 [H, W, 3], frames [T, H, W, 3], or a list of these"


class ColorIsaImageProcessor(BaseImageProcessor):
    r"""
    Resizes RGB images by area averaging and scales them to [0, 1].

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
            raise ValueError(f"Unknown options {sorted(kwargs)}; ColorIsaImageProcessor takes images, return_tensors.")
        if isinstance(images, list | tuple):
            if not images:
                raise ValueError(f"No images given; {_WANT}.")
            clips = [self._to_array(image) for image in images]
            if len({clip.ndim for clip in clips}) > 1 or (clips[0].ndim == 4 and len({len(c) for c in clips}) > 1):
                shapes = [clip.shape for clip in clips[:4]]
                raise ValueError(f"Images or clips of different lengths in one list: {shapes}. Give them separately.")
            pixels = np.stack([self._resize(clip) for clip in clips])
        else:
            array = self._to_array(images)
            pixels = self._resize(array if array.ndim == 4 else array[None])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

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
                raise ValueError(f"Image of shape {shape} is gray; {_WANT}. Colors are what this encoder sees by.")
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

    def _resize(self, array: np.ndarray) -> np.ndarray:
        """[(T,) H, W, 3] -> float32 [(T,) 3, size, size]."""
        frames = array.reshape(-1, *array.shape[-3:])
        size = (self.size, self.size)
        if frames.shape[1:3] != size:
            frames = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
        if frames.dtype == np.uint8:
            frames = frames.astype(np.float32) / 255
        frames = np.ascontiguousarray(frames.transpose(0, 3, 1, 2))
        return frames.reshape(*array.shape[:-3], *frames.shape[1:])


__all__ = ["ColorIsaImageProcessor"]
