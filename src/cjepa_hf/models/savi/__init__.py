"""Stochastic SAVi: slots of a video from pixels alone, trained by drawing every frame again."""

from .configuration_savi import SaviConfig
from .image_processing_savi import SaviImageProcessor
from .modeling_savi import SaviDecoderOutput, SaviModel, SaviOutput, SaviState

__all__ = ["SaviConfig", "SaviDecoderOutput", "SaviImageProcessor", "SaviModel", "SaviOutput", "SaviState"]
