"""Small checkpoints that ship with the package."""

from importlib import resources
from pathlib import Path

_ROOT = Path(str(resources.files(__name__)))


def bundled_names() -> list[str]:
    """Names of the checkpoints that ship in the wheel."""
    return sorted(path.parent.name for path in _ROOT.glob("*/config.json"))


def bundled_checkpoint(name: str = "push_t") -> Path:
    """
    Folder of a checkpoint that ships in the wheel, for `from_pretrained`.

    "push_t": a C-JEPA world model of Push-T with its slot encoder and image processor (see its README.md).
    "collisions": one of the collision world, which takes no actions, with its slot encoder, image processor and slot probe.
    "collisions_aloe": an ALOE with its processor, which answers questions about slots of that encoder.
    """
    if name not in bundled_names():
        raise ValueError(f"no bundled checkpoint {name!r}; expected one of {bundled_names()}.")
    return _ROOT / name
