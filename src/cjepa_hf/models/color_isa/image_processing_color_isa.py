"""Images of any size -> `pixel_values` of a ColorIsaModel."""

import cv2
import numpy as np

from ..images import RgbImageProcessor


class ColorIsaImageProcessor(RgbImageProcessor):
    r"""
    Resizes RGB images by area averaging and scales them to [0, 1]; see [`RgbImageProcessor`] for what they may be.

    Args:
        size (`int`, defaults to 64): Height and width of the result. Images that are not square are squeezed.
    """

    gray_hint = "Colors are what this encoder sees by."

    def __init__(self, size: int = 64, **kwargs):
        super().__init__(size, **kwargs)

    def _resize(self, frames: np.ndarray) -> np.ndarray:
        size = (self.size, self.size)
        if frames.shape[1:3] != size:
            frames = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
        if frames.dtype == np.uint8:
            frames = frames.astype(np.float32) / 255
        return np.ascontiguousarray(frames.transpose(0, 3, 1, 2))


__all__ = ["ColorIsaImageProcessor"]
