"""What the encoders of images share: a base of image processors, and a check of the `pixel_values` that models take."""

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature

_WANT = "expected RGB: a PIL image, uint8 [H, W, 3], frames [T, H, W, 3], or a list of these"


class RgbImageProcessor(BaseImageProcessor):
    r"""
    Base of the image processors: it checks RGB images and batches them, and a subclass resizes and scales them.

    Images: PIL images, numpy arrays or CPU tensors, [H, W, 3] or [T, H, W, 3], uint8 in 0-255 or float in [0, 1], any
    size; or lists of them. The result's `pixel_values` is float32 [B, 3, size, size] for images (B = 1 for one image,
    B = T for one array of frames) and [B, T, 3, size, size] for a list of equally long clips.

    Raises `ValueError` for gray or RGBA images, channels first, or float images that are not in [0, 1].
    """

    model_input_names = ["pixel_values"]
    gray_hint = "Repeat the channel three times."

    def __init__(self, size: int, **kwargs):
        super().__init__(**kwargs)
        if isinstance(size, dict):
            size = size.get("height")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size={size!r} must be a positive number of pixels.")
        self.size = size

    def preprocess(self, images, return_tensors: str | None = "pt", **kwargs) -> BatchFeature:
        """See the class. `return_tensors` is "pt" (default) or "np"."""
        if kwargs:
            name = type(self).__name__
            raise ValueError(f"Unknown options {sorted(kwargs)}; {name} takes images, return_tensors.")
        if isinstance(images, list | tuple):
            if not images:
                raise ValueError(f"No images given; {_WANT}.")
            clips = [self._to_array(image) for image in images]
            if len({clip.ndim for clip in clips}) > 1 or (clips[0].ndim == 4 and len({len(c) for c in clips}) > 1):
                shapes = [clip.shape for clip in clips[:4]]
                raise ValueError(f"Images or clips of different lengths in one list: {shapes}. Give them separately.")
            if len({(clip.shape, clip.dtype) for clip in clips}) == 1:
                pixels = self._to_pixels(np.stack(clips))
            else:
                pixels = np.stack([self._to_pixels(clip) for clip in clips])
        else:
            array = self._to_array(images)
            pixels = self._to_pixels(array if array.ndim == 4 else array[None])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def _resize(self, frames: np.ndarray) -> np.ndarray:
        """uint8, or float32 in [0, 1], [n, H, W, 3] -> float32 [n, 3, size, size], scaled as the model takes it."""
        raise NotImplementedError

    def _to_pixels(self, array: np.ndarray) -> np.ndarray:
        pixels = self._resize(array.reshape(-1, *array.shape[-3:]))
        return pixels.reshape(*array.shape[:-3], *pixels.shape[1:])

    def _to_array(self, image) -> np.ndarray:
        """Contiguous and writable, as torch.from_numpy wants it: uint8, or float32 in [0, 1], [(T,) H, W, 3]."""
        if isinstance(image, Image.Image):
            if image.mode != "RGB":
                raise ValueError(f'PIL image of mode {image.mode!r}; {_WANT}. Use image.convert("RGB").')
            return np.array(image)
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu()
            image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
        if not isinstance(image, np.ndarray):
            raise ValueError(f"Image of type {type(image).__name__}; {_WANT}.")
        shape = image.shape
        if image.ndim not in (3, 4) or shape[-1] != 3:
            if image.ndim in (3, 4) and shape[-3] == 3:
                raise ValueError(f"Image of shape {shape} has its channels first; {_WANT}. Move axis -3 to the end.")
            if image.ndim in (3, 4) and shape[-1] == 4:
                raise ValueError(f"Image of shape {shape} has 4 channels (RGBA?); {_WANT}. Drop the alpha channel.")
            if image.ndim == 2 or shape[-1:] == (1,):
                raise ValueError(f"Image of shape {shape} is gray; {_WANT}. {self.gray_hint}")
            raise ValueError(f"Image of shape {shape}; {_WANT}.")
        if 0 in shape:
            raise ValueError(f"Image of shape {shape} is empty; {_WANT}.")
        if image.dtype == np.uint8:
            return np.require(image, requirements=["C", "W"])
        if not np.issubdtype(image.dtype, np.floating):
            raise ValueError(f"Image of dtype {image.dtype}; {_WANT}. Convert it to uint8.")
        if not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(
                f"Float image with values from {image.min():.4g} to {image.max():.4g}; floats must be in [0, 1]. "
                "Convert 0-255 images to uint8."
            )
        return np.require(image, np.float32, ["C", "W"])


def check_pixel_values(
    pixel_values, size: int, processor: str, values: str, low: float, high: float, *, images: bool = False
) -> tuple[float, float] | None:
    """
    Raises `ValueError`, naming the image processor that makes what is missing, unless `pixel_values` is a float tensor
    [B, T, 3, size, size] (or with `images` [B, 3, size, size]) from `low` to `high`; `values` says that in words.

    Returns the smallest and the largest value; None while compiling, when they are not looked at.
    """
    want = f"expected float [B, T, 3, {size}, {size}]{f' or [B, 3, {size}, {size}]' if images else ''}, {values}"
    if not isinstance(pixel_values, torch.Tensor):
        raise ValueError(f"pixel_values is a {type(pixel_values).__name__}; {want}. Use {processor}.")
    shape = tuple(pixel_values.shape)
    if not pixel_values.is_floating_point():
        raise ValueError(f"pixel_values has dtype {pixel_values.dtype}; {want}. Use {processor}.")
    if len(shape) != 5 and not (images and len(shape) == 4):
        hint = "A single image or video needs a batch axis" + ("." if images else ", a frame also T = 1.")
        raise ValueError(f"pixel_values has shape {shape}; {want}. {hint}")
    if shape[-3] != 3:
        hint = "Channels come last here: permute them before height and width." if shape[-1] == 3 else ""
        raise ValueError(f"pixel_values has shape {shape}; {want}. {hint or 'Convert the images to RGB.'}")
    if shape[-2:] != (size, size):
        raise ValueError(f"pixel_values has shape {shape}; {want}. Resize with {processor}(size={size}).")
    if 0 in shape:
        raise ValueError(f"pixel_values has shape {shape}: no frames.")
    if torch.compiler.is_compiling():
        return None
    smallest, largest = (float(v) for v in pixel_values.detach().aminmax())
    if not (low <= smallest and largest <= high):
        raise ValueError(
            f"pixel_values range from {smallest:.4g} to {largest:.4g}; {want}. Use {processor}; drop frames with NaN."
        )
    return smallest, largest


__all__ = ["RgbImageProcessor", "check_pixel_values"]
