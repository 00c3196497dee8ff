"""VideoSAUR: slots of videos from DINOv2 features, carried from frame to frame."""

from .configuration_videosaur import VideoSaurConfig
from .image_processing_videosaur import VideoSaurImageProcessor
from .modeling_videosaur import VideoSaurDecoderOutput, VideoSaurModel, VideoSaurOutput

__all__ = ["VideoSaurConfig", "VideoSaurDecoderOutput", "VideoSaurImageProcessor", "VideoSaurModel", "VideoSaurOutput"]
