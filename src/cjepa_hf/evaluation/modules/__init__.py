"""Metrics as `evaluate` modules, one folder each; they wrap the functions of `cjepa_hf.evaluation.metrics`."""

from pathlib import Path


def metric_folder(name: str) -> Path:
    """
    Folder of a metric, for `evaluate.load(str(metric_folder(name)))`, which needs no connection.

    "success_rate": rate of solved tasks with its Wilson interval. "foreground_ari": adjusted Rand index of masks.
    """
    root = Path(__file__).parent
    folder = root / name
    if not name.isidentifier() or not (folder / f"{name}.py").is_file():
        known = sorted(path.parent.name for path in root.glob("*/*.py"))
        raise ValueError(f"no metric {name!r}; expected one of {known}.")
    return folder
