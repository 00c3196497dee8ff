"""Trains the VideoSAUR slot encoder on videos, over a frozen DINOv2: examples/train_videosaur.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from transformers.hf_argparser import HfArg

from ..models.videosaur import VideoSaurConfig, VideoSaurImageProcessor, VideoSaurModel
from .clips import ClipTrainArguments, train_on_clips
from .trainer import TrainResult


@dataclass(kw_only=True)
class VideoSaurTrainArguments(ClipTrainArguments):
    """Arguments of [`main`]; the defaults are the paper's for Push-T (examples/videosaur/)."""

    fixed_on_resume: ClassVar = (*ClipTrainArguments.fixed_on_resume, "backbone")

    # > Parameters that control the model
    backbone: str = HfArg(
        default="facebook/dinov2-small",
        help="Pretrained DINOv2, a folder or Hub id; random: one of backbone_config with random weights.",
    )
    backbone_revision: str | None = HfArg(default=None, help="Branch, tag or commit of a backbone on the Hub.")
    init_model: str | None = HfArg(
        default=None, help="VideoSaurModel (folder or Hub id) whose weights, backbone included, training starts from."
    )

    max_steps: int = HfArg(default=100_000, help="Optimizer steps.")
    batch_size: int = HfArg(default=64, help="Clips per optimizer step, counted over all processes.")
    learning_rate: float = HfArg(default=2e-4, help="Peak learning rate.")
    weight_decay: float = HfArg(default=0.0, help="Decoupled; 0 makes AdamW Adam.")
    warmup_steps: int = HfArg(default=2000, help="Steps of linear warm-up.")
    lr_scheduler: Literal["cosine", "exponential", "constant"] = HfArg(
        default="exponential",
        help="After the warm-up: cosine ends at lr_floor, exponential halves every lr_half_life steps.",
    )
    lr_half_life: int = HfArg(default=98_000, help="Steps in which exponential halves the learning rate.")
    gradient_clip: float = HfArg(default=0.05, help="Largest global gradient norm; 0: no clipping.")
    frame_stride: int = HfArg(default=2, help="A clip takes every so many-th frame of its video.")
    flip_probability: float = HfArg(default=0.5, help="Share of the clips that are mirrored, left to right.")
    render_resolution: int = HfArg(default=224, help="Pixels per side of frames that a simulator draws.")


def build_model(args: VideoSaurTrainArguments, overrides: dict[str, Any]):
    """The model to train and its image processors: the paper's training resizes otherwise than its extraction."""
    if args.init_model:
        model = VideoSaurModel.from_pretrained(args.init_model, output_loading_info=bool(overrides), **overrides)
        model = model[0] if overrides else model  # parts that the overrides add start fresh
    elif args.backbone == "random":
        model = VideoSaurModel(VideoSaurConfig(**overrides))
    else:
        if "backbone_config" in overrides:
            raise ValueError(f"backbone_config is that of {args.backbone}; --backbone random takes one of your own")
        model = VideoSaurModel.from_pretrained_backbone(args.backbone, revision=args.backbone_revision, **overrides)
    size = model.config.image_size
    training = VideoSaurImageProcessor(size=size, resample="bicubic", antialias=False)
    return model.train(), training, VideoSaurImageProcessor(size=size)


def main(argv: Sequence[str] | None = None) -> TrainResult:
    """Trains as the command line `argv` (default: `sys.argv[1:]`) says and leaves the model in `--output_dir`."""
    return train_on_clips(VideoSaurTrainArguments, VideoSaurConfig, build_model, argv, __doc__)


if __name__ == "__main__":
    main()
