"""Training on slots and frames: one Accelerate loop (`trainer.py`) and one script module per model."""

from .arguments import TrainArguments, parse_arguments
from .trainer import TrainResult, train

__all__ = ["TrainArguments", "TrainResult", "parse_arguments", "train"]
