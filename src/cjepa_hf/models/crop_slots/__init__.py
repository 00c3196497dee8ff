"""A small self-supervised slot encoder that follows objects in front of a known, constant background."""

from .configuration_crop_slots import CropSlotsConfig
from .image_processing_crop_slots import CropSlotsImageProcessor
from .modeling_crop_slots import CropSlotsDecoderOutput, CropSlotsModel, CropSlotsOutput, CropSlotsState

__all__ = [
    "CropSlotsConfig",
    "CropSlotsDecoderOutput",
    "CropSlotsImageProcessor",
    "CropSlotsModel",
    "CropSlotsOutput",
    "CropSlotsState",
]
