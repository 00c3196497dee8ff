"""Trains DINO-WM on a dataset of patch tokens, or OC-DINO-WM on one of slots: `cjepa-hf train dino-wm` and
`examples/train_dino_wm.py`.

Data, loop and arguments are those of the C-JEPA training; only the model is another (arXiv 2411.04983, teacher forcing).
Tokens are patches unless `--token_type slots` is given.
"""

from collections.abc import Sequence

from ..models.dino_wm import DinoWmModel
from .cjepa import train_world_model
from .trainer import TrainResult


def main(argv: Sequence[str] | None = None) -> TrainResult:
    """Trains as the command line `argv` (default: `sys.argv[1:]`) says and leaves the model in `--output_dir`."""
    return train_world_model(DinoWmModel, argv, __doc__)


if __name__ == "__main__":
    main()
