"""A small self-supervised slot encoder for scenes whose objects have constant colors."""

from .configuration_color_isa import ColorIsaConfig
from .image_processing_color_isa import ColorIsaImageProcessor
from .modeling_color_isa import ColorIsaDecoderOutput, ColorIsaModel, ColorIsaOutput

__all__ = ["ColorIsaConfig", "ColorIsaDecoderOutput", "ColorIsaImageProcessor", "ColorIsaModel", "ColorIsaOutput"]
