"""True states of collision scenes as slots: a slot dataset without an encoder, the ceiling of every encoder.

A slot holds, in world units: x, y; whether the place is empty; shape, color and material (one-hot, 0.7); for cubes the
direction of their sides (0.1 cos 4a, 0.1 sin 4a); and the velocity only if asked for. An object out of view is not there:
its slot is the same as that of a place without object, one recognisable state ([`empty_slot`]). These features are spread
over all numbers of a slot by rows of a Hadamard matrix, whose products are exact and keep distances, so that no number of a
slot means anything by itself, as in learned slots.
"""

import itertools
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..simulators.rendering import COLORS, MATERIALS, MAX_OBJECTS, OBJECT_STATE_NAMES, SHAPES, VIEW_SIZE
from .clevrer import SPLITS, ClevrerFolder, read_json
from .slots import SlotDatasetWriter, fingerprint, is_finished

__all__ = ["OBJECT_PAIRS", "annotation_states", "empty_slot", "state_encoder", "state_slots", "write_state_slots"]

STATE_ENCODER = "state"
OBJECT_PAIRS = tuple(itertools.combinations(range(MAX_OBJECTS), 2))  # columns of `contacts`
_ATTRIBUTE_SCALE, _ANGLE_SCALE, _VELOCITY_SCALE = 0.7, 0.1, 0.5
_FPS = 25


@lru_cache(maxsize=4)
def _directions(slot_size: int) -> np.ndarray:
    """Orthonormal rows float64 [slot_size - 1, slot_size], all entries of equal size; none is constant."""
    if slot_size < 32 or slot_size & (slot_size - 1):
        raise ValueError(f"slot_size={slot_size}: expected a power of two, at least 32")
    matrix = np.ones((1, 1))
    while len(matrix) < slot_size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix[1:] / np.sqrt(slot_size)


def state_slots(
    states: np.ndarray, *, slot_size: int = 64, velocities: bool = False, in_view: np.ndarray | None = None
) -> np.ndarray:
    """
    Slots float32 [..., 6, slot_size] of states [..., 60] (6 places of `OBJECT_STATE_NAMES`).

    Args:
        slot_size: a power of two, at least 32.
        velocities: also put the velocity into the slot (0.5 x units per second).
        in_view: bool [..., 6]; default: the center is inside the view.

    Raises `ValueError` for states of another shape or with NaN.
    """
    states = np.asarray(states, dtype=np.float64)
    width = len(OBJECT_STATE_NAMES)
    if states.shape[-1:] != (MAX_OBJECTS * width,) or not np.isfinite(states).all():
        raise ValueError(f"states have shape {states.shape}: expected finite numbers [..., {MAX_OBJECTS * width}]")
    states = states.reshape(*states.shape[:-1], MAX_OBJECTS, width)
    if in_view is None:
        in_view = (np.abs(states[..., 1:3]) < np.array(VIEW_SIZE) / 2).all(axis=-1)
    there = (states[..., 0] > 0.5) & in_view
    kinds = states[..., 7:].astype(int)
    parts = [states[..., 1:3], np.zeros_like(states[..., :1])]
    for column, values in enumerate((SHAPES, COLORS, MATERIALS)):
        parts.append(_ATTRIBUTE_SCALE * np.eye(len(values))[kinds[..., column]])
    cube = (kinds[..., 0] == SHAPES.index("cube"))[..., None]
    angle = 4 * states[..., 3:4]
    parts.append(_ANGLE_SCALE * cube * np.concatenate([np.cos(angle), np.sin(angle)], axis=-1))
    if velocities:
        parts.append(_VELOCITY_SCALE * states[..., 4:6])
    features = np.concatenate(parts, axis=-1) * there[..., None]
    features[..., 2] = ~there
    directions = _directions(slot_size)
    return (features @ directions[: features.shape[-1]]).astype(np.float32)


def empty_slot(slot_size: int = 64) -> np.ndarray:
    """The slot of a place without object, float32 [slot_size]."""
    return _directions(slot_size)[2].astype(np.float32)


def state_encoder(slot_size: int = 64, velocities: bool = False) -> dict[str, Any]:
    """What a slot dataset records of slots made by [`state_slots`]."""
    return {
        "name": STATE_ENCODER,
        "config_hash": fingerprint({"slot_size": slot_size, "velocities": velocities, "version": 1}),
        "velocities": velocities,
        "empty_slot": empty_slot(slot_size).tolist(),
    }


def annotation_states(annotation: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    What an annotation of CLEVRER or of our scenes says, the object with id k at place k.

    Returns:
        states float32 [T, 60], in_view bool [T, 6], contacts bool [T, 15]: the pairs of `OBJECT_PAIRS` whose contact
        begins in the step after the frame.

    Raises `ValueError` for what is no annotation, and for more than 6 objects.
    """
    name = annotation.get("video_filename", "the video") if isinstance(annotation, dict) else "the file"
    try:
        kinds = {o["object_id"]: o for o in annotation["object_property"]}
        if not set(kinds) <= set(range(MAX_OBJECTS)):
            raise ValueError(f"{name} has objects {sorted(kinds)}: expected ids from 0 to {MAX_OBJECTS - 1}")
        frames = annotation["motion_trajectory"]
        states = np.zeros((len(frames), MAX_OBJECTS, len(OBJECT_STATE_NAMES)))
        in_view = np.zeros((len(frames), MAX_OBJECTS), dtype=bool)
        for t, frame in enumerate(frames):
            for o in frame["objects"]:
                k, speed = o["object_id"], o["velocity"]
                states[t, k, :7] = (
                    1, *o["location"][:2], o["orientation"][2], speed[0], speed[1], o["angular_velocity"][2],
                )  # fmt: skip
                in_view[t, k] = o["inside_camera_view"]
        for k, o in kinds.items():
            states[:, k, 7:] = SHAPES.index(o["shape"]), COLORS.index(o["color"]), MATERIALS.index(o["material"])
        contacts = np.zeros((len(frames), len(OBJECT_PAIRS)), dtype=bool)
        for c in annotation["collision"]:
            if c["frame_id"] < len(frames):
                contacts[c["frame_id"], OBJECT_PAIRS.index(tuple(sorted(c["object_ids"])))] = True
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{name} is no annotation of CLEVRER ({error!r})") from None
    return states.reshape(len(frames), -1).astype(np.float32), in_view, contacts


def write_state_slots(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    splits: Sequence[str] | None = None,
    frame_skip: int = 4,
    slot_size: int = 64,
    velocities: bool = False,
    num_frames: int | None = None,
    frames_per_file: int = 16384,
    progress: bool = True,
) -> Path:
    """
    Write the true states of annotated videos as a slot dataset (`data/slots.py`), with `state` and `contacts` beside.

    Args:
        source: what `cjepa-hf collect collisions` made, or real CLEVRER with its annotations.
        splits: default: those that have annotations (real CLEVRER has none of its test videos).
        frame_skip: suggested for windows. 4 frames are 0.16 s.
        slot_size, velocities: see [`state_slots`].
        num_frames: stop each split after the video that reaches this many frames.

    Interrupted, it goes on after the last finished file; of a finished folder made with the same arguments nothing is
    written again. Raises `ValueError` where there are no annotations and for damaged ones.
    """
    folder, output_dir = ClevrerFolder(source), Path(output_dir)
    chosen = SPLITS if splits is None else splits
    files = {split: folder.files("annotation", split) for split in chosen}
    for split, found in list(files.items()):
        if not found and splits is not None:
            raise ValueError(f"{source} has no annotations of the split {split!r}")
        if not found:
            del files[split]
    if not files:
        raise ValueError(
            f"{source} has no annotations (annotation_00000.json, ...): make scenes with `cjepa-hf collect collisions`"
        )
    arguments = {
        "frame_skip": frame_skip,
        "encoder": state_encoder(slot_size, velocities),
        "source": {"name": Path(source).resolve().name, "splits": {split: len(found) for split, found in files.items()},
                   "num_frames": num_frames},
        "fps": _FPS,
        "units": {"state": "world units, rad, per second"},
    }  # fmt: skip
    if is_finished(output_dir, arguments):
        return output_dir
    writer = SlotDatasetWriter(output_dir, frames_per_file=frames_per_file, **arguments)
    for split, found in files.items():
        done, total = writer.finished(split), 0
        bar = tqdm(found.items(), desc=f"state slots, {split}", unit="video", disable=not progress)
        for index, path in bar:
            if num_frames is not None and total >= num_frames:
                break
            name = f"video_{index:05d}"
            if name in done and num_frames is None:
                continue
            states, in_view, contacts = annotation_states(read_json(path))
            total += len(states)
            if name in done:
                continue
            slots = state_slots(states, slot_size=slot_size, velocities=velocities, in_view=in_view)
            writer.write(split, {"episode_id": name, "slots": slots, "state": states, "contacts": contacts})
    return writer.close()
