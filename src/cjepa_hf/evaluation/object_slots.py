"""Slots of collision scenes with known objects: object k at place k, from true states or from what an encoder sees."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..data.extract import drawn_size, encode_scenes, open_encoder
from ..data.slots import load_slot_dataset
from ..data.state_slots import empty_slot, state_slots
from ..models.cjepa.modeling_cjepa import solve_assignment
from ..simulators.collisions import VISIBLE_FRAMES
from ..simulators.rendering import (
    COLORS,
    MATERIALS,
    MAX_OBJECTS,
    OBJECT_RADIUS,
    OBJECT_STATE_NAMES,
    SHAPES,
    VIEW_SIZE,
)
from ..slot_probe import SlotProbe

ATTRIBUTES = {"shape": SHAPES, "color": COLORS, "material": MATERIALS}
FAR = 1.0  # world units: a slot that is further away is as bad a match as any


def object_truth(states: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions float32 [V, T, 6, 2], in_view bool [V, T, 6] and kinds int [V, 6, 3] of states [V, T, 60]."""
    rows = states.reshape(*states.shape[:2], MAX_OBJECTS, len(OBJECT_STATE_NAMES))
    positions = rows[..., 1:3].astype(np.float32)
    in_view = (rows[..., 0] > 0.5) & (np.abs(positions) < np.array(VIEW_SIZE) / 2).all(-1)
    return positions, in_view, rows[:, 0, :, 7:].astype(int)


def match_objects(
    positions: torch.Tensor,
    present: torch.Tensor,
    true_positions: torch.Tensor,
    in_view: torch.Tensor,
    mismatch: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The slot of every object of a video, exactly and for all videos at once: the assignment with the smallest mean distance
    over the frames in which the object is in view (plus `mismatch`), where an absent or far slot counts as 1 unit away.

    Args:
        positions: float [V, T, N, 2] read from slots, present: bool [V, T, N].
        true_positions: float [V, T, 6, 2], in_view: bool [V, T, 6].
        mismatch: float [V, 6, N], added to the mean distance (attributes).

    Returns:
        int64 [V, N]: an order of the slots in which object k stands at place k; slots of no object come last. Objects
        that are never in view get what is left.

    Raises `ValueError` for fewer slots than objects.
    """
    num_slots = positions.shape[2]
    if num_slots < MAX_OBJECTS:
        raise ValueError(f"{num_slots} slots cannot hold {MAX_OBJECTS} objects: use an encoder with more")
    distance = (positions[:, :, None] - true_positions[:, :, :, None]).square().sum(-1).sqrt()  # [V, T, 6, N]
    distance = torch.where(present[:, :, None], distance, FAR).clamp(max=FAR) * in_view[..., None]
    frames = in_view.sum(1)[..., None]  # [V, 6, 1]
    cost = distance.sum(1) / frames.clamp(min=1)
    if mismatch is not None:
        cost = cost + mismatch * (frames > 0)
    return solve_assignment(torch.nn.functional.pad(cost, (0, 0, 0, num_slots - MAX_OBJECTS)))


def reorder(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`values` [V, T, N, ...] with the slots in the order [V, N]."""
    index = order[:, None].reshape(len(order), 1, -1, *[1] * (values.ndim - 3))
    return values.gather(2, index.expand(*values.shape))


class StateSlots:
    """True states as slots (`data/state_slots.py`): what a perfect encoder would give."""

    name = "state"

    def __init__(self, slot_size: int = 64, velocities: bool = False):
        self.slot_size, self.velocities = slot_size, velocities

    def slots(self, states: np.ndarray, *, progress: bool = False) -> torch.Tensor:
        """float32 [V, T, 6, D] of states [V, T, 60]."""
        return torch.from_numpy(state_slots(states, slot_size=self.slot_size, velocities=self.velocities))

    def fit(self, states: np.ndarray, *, progress: bool = False) -> SlotProbe:
        """The probe of these slots; `states` [V, T, 60] of training videos."""
        probe = fit_probe(self.slots(states[:, ::4]), states[:, ::4], ridge=1e-9)
        probe.empty_slot = torch.from_numpy(empty_slot(self.slot_size))
        return probe

    def quality(self, slots: torch.Tensor, states: np.ndarray) -> dict[str, Any]:
        return {"velocities": self.velocities}


class PixelSlots:
    """
    What a slot encoder sees in rendered scenes. Its slots get their objects by the centers of its masks in training videos;
    a probe that learns from these then matches all other videos.

    Args:
        encoder: model, folder or Hub id, also of a world model that holds one.
        resolution: of the frames that are drawn, pixels; default: what the encoder takes.
    """

    def __init__(
        self,
        encoder: torch.nn.Module | str | os.PathLike,
        *,
        device: str = "cpu",
        resolution: int | None = None,
        seed: int = 0,
    ):
        self.model, self.processor, description = open_encoder(encoder, None, None, device)
        self.model.eval()
        self.name = description["name"]
        self.slot_size = self.model.config.slot_size
        self.resolution, self.seed = resolution or drawn_size(self.model), seed
        self.probe: SlotProbe | None = None

    def _encode(self, states: np.ndarray, keep_masks: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        slots, centers = [], []
        for encoded in encode_scenes(
            ((f"video_{number:05d}", rows) for number, rows in enumerate(states)), self.model, self.processor,
            resolution=self.resolution, group_size=1, num_videos=1, seed=self.seed, keep_masks=keep_masks,
        ):  # fmt: skip
            slots.append(np.concatenate(encoded.slots))
            if keep_masks:
                centers.append(mask_centers(np.concatenate(encoded.masks)))
        stacked = torch.from_numpy(np.stack(slots)).float()
        return stacked, torch.from_numpy(np.stack(centers)).float() if keep_masks else None

    def fit(self, states: np.ndarray, *, progress: bool = False) -> SlotProbe:
        """Fits the probe on training videos, states [V, T, 60], and keeps it for matching."""
        slots, centers = self._encode(states, keep_masks=True)
        positions, in_view, _ = object_truth(states)
        truth = torch.from_numpy(positions), torch.from_numpy(in_view)
        order = match_objects(centers[..., :2], centers[..., 2] > 0.3 * _object_share(), *truth)
        self.probe = fit_probe(reorder(slots, order), states)
        # once more, by what the probe reads
        self.probe = fit_probe(reorder(slots, self._order(slots, states)), states)
        return self.probe

    def _order(self, slots, states):
        if self.probe is None:
            raise ValueError("fit() comes before slots(): the probe tells which slot holds which object")
        positions, in_view, kinds = object_truth(states)
        in_view = torch.from_numpy(in_view)
        present = self.probe.present(slots)
        mismatch = 0.0
        for column, score in enumerate(self.probe.scores(slots).values()):
            seen = (score * present[..., None]).sum(1) / present.sum(1)[..., None].clamp(min=1)  # [V, N, values]
            label = torch.from_numpy(kinds[..., column])  # [V, 6]
            own = seen.transpose(1, 2).gather(1, label[..., None].expand(-1, -1, seen.shape[1]))
            mismatch = mismatch + (1 - own).clamp(0, 1)
        return match_objects(
            self.probe.positions(slots), present, torch.from_numpy(positions), in_view, mismatch / len(ATTRIBUTES)
        )

    def slots(self, states: np.ndarray, *, progress: bool = False) -> torch.Tensor:
        """float32 [V, T, N, D] of states [V, T, 60], the objects first."""
        slots, _ = self._encode(states, keep_masks=False)
        return reorder(slots, self._order(slots, states))

    def quality(self, slots: torch.Tensor, states: np.ndarray) -> dict[str, Any]:
        """How well matched slots [V, T, N, D] show the objects; see [`slot_quality`]."""
        return slot_quality(self.probe, slots, states)


def dataset_scenes(
    dataset: str | os.PathLike, split: str, num_videos: int, columns: Sequence[str] = ("state",)
) -> list[np.ndarray]:
    """
    Columns of the first videos of a slot dataset of collision scenes, without shorter videos: state float32 [V, 128, 60],
    contacts bool [V, 128, 15].

    Raises `ValueError` for a dataset without them, or of another world.
    """
    loaded = load_slot_dataset(dataset, split, check_values=False)
    for column in columns:
        if column not in loaded.columns:
            raise ValueError(
                f"{loaded.name} has no column {column!r}: give slots that `cjepa-hf extract SCENES --encoder state` made"
            )
    data = loaded.data.select(range(min(num_videos, len(loaded)))).with_format("numpy", columns=list(columns))
    rows = [[row[column][:VISIBLE_FRAMES] for column in columns] for row in data]
    rows = [row for row in rows if len(row[0]) == VISIBLE_FRAMES]
    width = MAX_OBJECTS * len(OBJECT_STATE_NAMES)
    if not rows or rows[0][columns.index("state")].shape[1] != width:
        raise ValueError(
            f"{loaded.name} has no video of {VISIBLE_FRAMES} frames with states of {width} numbers, as collision scenes have"
        )
    return [np.stack(part) for part in zip(*rows)]


def fit_object_probe(
    dataset: str | os.PathLike,
    encoder: str | os.PathLike,
    *,
    num_videos: int = 300,
    num_test_videos: int = 100,
    device: str = "cpu",
) -> tuple[SlotProbe, dict[str, Any]]:
    """
    A probe of collision scenes that tells where the object of a slot is and what it looks like, learned from true states.

    Args:
        dataset: slots that `cjepa-hf extract SCENES` made; only the column state is read, of the splits train and validation.
        encoder: folder or Hub id of a slot encoder, or of a world model with one; "state" for true states as slots.

    Returns:
        the probe, and how well it reads the videos of the split validation: as `slot_quality`, and `objects`, the share of
        objects that are described right in shape, color and material over their whole video.
    """
    (train,), (test,) = (
        dataset_scenes(dataset, split, count)
        for split, count in (("train", num_videos), ("validation", num_test_videos))
    )
    source = StateSlots() if str(encoder) == "state" else PixelSlots(encoder, device=device)
    probe = source.fit(train)
    slots = source.slots(test)
    right = []
    _, in_view, kinds = object_truth(test)
    for video, seen, truth in zip(slots, in_view, kinds, strict=True):
        described = probe.describe(video)
        for k in np.flatnonzero(seen.sum(0) >= 3):
            names = {name: values[truth[k, column]] for column, (name, values) in enumerate(ATTRIBUTES.items())}
            right.append(described[k] == names)
    quality = slot_quality(probe, slots, test) | {"objects": float(np.mean(right)), "num_objects": len(right)}
    return probe, {"encoder": source.name, "num_videos": len(train), "num_test_videos": len(test), **quality}


def slot_quality(probe: SlotProbe, slots: torch.Tensor, states: np.ndarray) -> dict[str, float]:
    """
    missed: share of the frames of objects in view whose slot says that there is none; position_error_median, _p90 (world
    units, of the others); elsewhere: share of them further than a radius away (another object, or none); false: share of
    the frames of objects out of view whose slot says that there is one; attributes: share of right ones.
    """
    positions, in_view, kinds = object_truth(states)
    objects = slots[:, :, :MAX_OBJECTS]
    present = probe.present(objects).numpy()
    error = np.linalg.norm(probe.positions(objects).numpy() - positions, axis=-1)[in_view & present]
    rows = states.reshape(*states.shape[:2], MAX_OBJECTS, -1)
    away = (rows[..., 0] > 0.5) & ~in_view
    right = []
    for column, score in enumerate(probe.scores(objects).values()):
        right.append((score.argmax(-1).numpy() == kinds[:, None, :, column])[in_view & present])
    return {
        "missed": float(1 - present[in_view].mean()),
        "position_error_median": float(np.median(error)) if len(error) else float("nan"),
        "position_error_p90": float(np.quantile(error, 0.9)) if len(error) else float("nan"),
        "elsewhere": float((error > OBJECT_RADIUS).mean()) if len(error) else float("nan"),
        "false": float(present[away].mean()) if away.any() else float("nan"),
        "attributes": float(np.mean(right)) if right[0].size else float("nan"),
    }


def fit_probe(slots: torch.Tensor, states: np.ndarray, ridge: float = 1e-3) -> SlotProbe:
    """A probe of slots [V, T, N, D] whose object k stands at place k; states [V, T, 60]."""
    positions, in_view, kinds = object_truth(states)
    more = slots.shape[2] - MAX_OBJECTS

    def flat(values, width):  # slots of no object have no truth
        values = np.pad(values, ((0, 0), (0, 0), (0, more), *[(0, 0)] * (width - 3)))
        return torch.from_numpy(values).flatten(0, 2)

    kinds = np.broadcast_to(kinds[:, None], (*in_view.shape, 3))
    labels = {name: flat(kinds[..., k], 3) for k, name in enumerate(ATTRIBUTES)}
    return SlotProbe.fit(
        slots.flatten(0, 2),
        present=flat(in_view, 3),
        positions=flat(positions, 4),
        labels=labels,
        attributes=ATTRIBUTES,
        ridge=ridge,
    )


def mask_centers(masks: np.ndarray) -> np.ndarray:
    """float [T, N, 3] of masks [T, N, H, W]: x, y of the center in world units, and the share of the picture."""
    masks = masks.astype(np.float64)
    height, width = masks.shape[-2:]
    x = ((np.arange(width) + 0.5) / width - 0.5) * VIEW_SIZE[0]
    y = ((np.arange(height) + 0.5) / height - 0.5) * VIEW_SIZE[1]
    mass = masks.sum((-1, -2))
    safe = np.maximum(mass, 1e-9)
    return np.stack(
        [(masks.sum(-2) * x).sum(-1) / safe, (masks.sum(-1) * y).sum(-1) / safe, mass / (height * width)], axis=-1
    )


def _object_share() -> float:
    """Share of the picture that a disc covers."""
    return float(np.pi * OBJECT_RADIUS**2 / (VIEW_SIZE[0] * VIEW_SIZE[1]))
