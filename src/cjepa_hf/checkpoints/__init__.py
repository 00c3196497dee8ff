"""Small checkpoints that ship with the package."""

from importlib import resources
from pathlib import Path


def bundled_checkpoint(name: str = "push_t") -> Path:
    """
    Folder of a checkpoint that ships in the wheel, for `from_pretrained`.

    "push_t": a C-JEPA world model of Push-T with its slot encoder and image processor (see its README.md).
    """
    root = Path(str(resources.files(__name__)))
    folder = root / name
    if not (folder / "config.json").is_file():
        known = sorted(path.parent.name for path in root.glob("*/config.json"))
        raise ValueError(f"no bundled checkpoint {name!r}; expected one of {known}.")
    return folder
