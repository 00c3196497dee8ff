"""Trains the SAVi slot encoder on videos: examples/train_savi.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.hf_argparser import HfArg

from ..models.savi import SaviConfig, SaviImageProcessor, SaviModel
from .clips import ClipTrainArguments, train_on_clips
from .trainer import TrainResult


@dataclass(kw_only=True)
class SaviTrainArguments(ClipTrainArguments):
    """Arguments of [`main`]; the defaults are the paper's for the optimizer (examples/savi/clevrer.yaml has the rest)."""

    # > Parameters that control the model
    init_model: str | None = HfArg(
        default=None, help="SaviModel (folder or Hub id) whose weights training starts from."
    )

    batch_size: int = HfArg(default=64, help="Clips per optimizer step, counted over all processes.")
    learning_rate: float = HfArg(default=1e-4, help="Peak learning rate.")
    weight_decay: float = HfArg(default=0.0, help="Decoupled; 0 makes AdamW Adam.")
    gradient_clip: float = HfArg(default=0.05, help="Largest global gradient norm; 0: no clipping.")
    lr_floor: float = HfArg(default=0.01, help="Share of the peak learning rate that cosine ends at.")


def build_model(args: SaviTrainArguments, overrides: dict[str, Any]):
    """The model to train, and twice its image processor: it is trained on what it will see."""
    if args.init_model:
        model = SaviModel.from_pretrained(args.init_model, output_loading_info=bool(overrides), **overrides)
        model = model[0] if overrides else model  # parts that the overrides add start fresh
    else:
        model = SaviModel(SaviConfig(**overrides))
    processor = SaviImageProcessor(size=model.config.image_size)
    return model, processor, processor


def main(argv: Sequence[str] | None = None) -> TrainResult:
    """Trains as the command line `argv` (default: `sys.argv[1:]`) says and leaves the model in `--output_dir`."""
    return train_on_clips(SaviTrainArguments, SaviConfig, build_model, argv, __doc__)


if __name__ == "__main__":
    main()
