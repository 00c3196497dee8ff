"""Data: collected episodes, slot datasets, windows. Names are imported on first use (torch takes seconds)."""

from importlib import import_module

_NAMES = {
    "SlotDataset": "slots",
    "SlotDatasetWriter": "slots",
    "SlotWindows": "slots",
    "StreamingSlotWindows": "slots",
    "load_slot_dataset": "slots",
    "normalize_windows": "slots",
    "window_statistics": "slots",
    "write_slot_dataset": "slots",
    "extract_slots": "extract",
    "open_videos": "video",
}
__all__ = list(_NAMES)


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
