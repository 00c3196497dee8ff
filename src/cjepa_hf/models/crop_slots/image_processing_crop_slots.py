"""Images of any size -> `pixel_values` of a CropSlotsModel."""

from ..color_isa.image_processing_color_isa import ColorIsaImageProcessor


class CropSlotsImageProcessor(ColorIsaImageProcessor):
    r"""
    Resizes RGB images by area averaging and scales them to [0, 1]; see [`RgbImageProcessor`] for what they may be.

    Args:
        size (`int`, defaults to 64): Height and width of the result. Images that are not square are squeezed, which the
            model knows (`CropSlotsConfig.view_size`).
    """

    gray_hint = "Objects are told from the background by their colors."


__all__ = ["CropSlotsImageProcessor"]
