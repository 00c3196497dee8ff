"""Rollouts in slot space, and what would have been: interventions on the objects of a scene.

[`imagine`] rolls a scene out as it is and once per intervention, all in one batch, and compares them object by object.
Three interventions take an object away, and they do not mean the same:

- [`Drop`]: the slot leaves the set; the model sees a scene of N - 1 slots. "There is one object less."
- [`Empty`]: the slot stays and holds the state that slots without an object have. "This place holds nothing."
- [`Mask`]: the slot is hidden after the first frame(s), and the model itself fills in where the object was. "It is there,
  but nobody looked." This is what C-JEPA's training does (paper section 3.2); it removes nothing.

[`Replace`] puts another object, or the same one elsewhere, in its place; [`Delay`] changes when it enters; [`Act`] changes
the actions. Axes: B scenes, T frames, N slots, D slot size, I interventions, K imagined frames, A action size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cjepa_hf.models.cjepa import CJepaModel

__all__ = [
    "Act",
    "Delay",
    "Drop",
    "Empty",
    "Imagination",
    "Intervention",
    "Mask",
    "Replace",
    "extend_video",
    "first_contact",
    "imagine",
    "is_empty",
    "remove_object",
]

# A slot: one number for all scenes, or one per scene [B].
Slot = int | torch.Tensor


@dataclass(frozen=True, eq=False)
class Drop:
    """Take the object out of the set: the model sees N - 1 slots. Needs no knowledge of what an empty slot looks like."""

    slot: Slot


@dataclass(frozen=True, eq=False)
class Empty:
    """Put the state of a slot without object in the object's place, in all frames. Needs `empty_slot`."""

    slot: Slot


@dataclass(frozen=True, eq=False)
class Mask:
    """
    Hide the object after the model's `visible_prefix`: the model fills in its states from the other objects, and the
    rollout goes on from these. It stands for "not observed", not for "not there".
    """

    slot: Slot


@dataclass(frozen=True, eq=False)
class Replace:
    """
    Swap in other slots: another object, or this one at another place.

    Args:
        by: [D] or [B, D] (the same in every frame), [T, D] or [B, T, D] (frame by frame, as the scene's own), float.
    """

    slot: Slot
    by: torch.Tensor | np.ndarray


@dataclass(frozen=True, eq=False)
class Delay:
    """
    Everything the object was seen doing happens `frames` frames later; before its first one its slot is empty (needs
    `empty_slot`). Negative: earlier, as far as its later frames are known. Frames of it that fall behind `start` are given
    to the rollout until the model has seen it for a full history.
    """

    slot: Slot
    frames: int


@dataclass(frozen=True, eq=False)
class Act:
    """Other actions: [T0 + K - 1, A] or [B, T0 + K - 1, A], normalised, laid out as the `actions` of [`imagine`]."""

    actions: torch.Tensor | np.ndarray


Intervention = Drop | Empty | Mask | Replace | Delay | Act


@dataclass(frozen=True)
class Imagination:
    """
    What [`imagine`] returns. Frame k of all tensors is frame `start + k` of the video.

    Attributes:
        factual: float32 [B, K, N, D], the rollout without intervention.
        slots: float32 [B, I, K, N, D], with each of them; NaN where a slot was dropped.
        present: bool [B, I, N], False where a slot was dropped.
        changed: bool [B, I, N], the slots that the intervention itself set.
        effect: float32 [B, I, K, N], distance of a slot from the factual one, slot units; NaN where it was dropped.
        threshold: float32 [B], distance from which on an object counts as affected.
        affected: bool [B, I, N], objects beside the changed ones that end up further than `threshold` from where they
            would have been, at any frame.
        affected_from: int64 [B, I, N], first such k, -1 for the others.
        start: int64 [B], the first imagined frame.
        history: int64 [B], steps that the model saw before; fewer than `model.config.history_length` where `start` is
            early, which is less than it was trained with.
    """

    factual: torch.Tensor
    slots: torch.Tensor
    present: torch.Tensor
    changed: torch.Tensor
    effect: torch.Tensor
    threshold: torch.Tensor
    affected: torch.Tensor
    affected_from: torch.Tensor
    start: torch.Tensor
    history: torch.Tensor


@torch.no_grad()
def imagine(
    model: CJepaModel,
    slots: torch.Tensor,
    interventions: Sequence[Intervention | Sequence[Intervention]] = (),
    *,
    num_frames: int,
    start: int | torch.Tensor | None = None,
    frame_skip: int = 1,
    actions: torch.Tensor | None = None,
    proprio: torch.Tensor | None = None,
    empty_slot: torch.Tensor | None = None,
    empty_tolerance: float = 0.1,
    entries: bool = False,
    match_slots: bool = False,
    effect_threshold: float | None = None,
    batch_size: int = 256,
) -> Imagination:
    """
    The factual rollout of scenes and one for every intervention.

    Args:
        slots: [B, T, N, D] float, observed frames. The model sees those before `start`; later ones are used only where
            `entries` or a [`Delay`] asks for them.
        interventions: each one is applied to all scenes (with slots [B] to another object in each); a sequence in the
            place of one means all of them together.
        num_frames: K, frames to imagine.
        start: first imagined frame, one number or [B]; default T.
        frame_skip: video frames between two steps of the model. 1: `slots` are steps already. Above, every frame is
            imagined by `frame_skip` interleaved rollouts side by side, as the released code does.
        actions: normalised, [B, T0 + K - 1, A], where T0 is `start`; action t belongs to frame t. Only with
            `frame_skip=1` and one `start`.
        proprio: normalised, [B, T0, P], the same.
        empty_slot: [D], what a slot without object looks like; default: `model.slot_encoder.empty_slot`, where there is
            one. With it, interventions on objects that are not there are refused.
        empty_tolerance: share of the largest distance of a scene's slots from `empty_slot`; nearer ones are empty.
        entries: show the model objects that enter after `start`, from `slots`, until it has seen them for a full
            history (needs `empty_slot`). Their path is that of the video, so it is fair only before they meet what the
            intervention has changed.
        match_slots: keep the order of slots by assignment to the step before (see [`CJepaModel.rollout`]).
        effect_threshold: in slot units; default: a tenth of the mean distance between two slots of the scene in the last
            observed frame.
        batch_size: rollouts at a time, which bounds memory.

    What `entries` and [`Delay`] show is seen at once: where a pass of the model predicts more steps (`prediction_length`), those
    after it are predicted again, in all rollouts of the scene, so that the comparison stays fair.

    Raises `ValueError` for wrong shapes, slots that do not exist or hold no object, and videos that are too short.
    """
    slots, start = _checked_slots(model, slots, start, num_frames, frame_skip)
    batch, total, num_slots, _ = slots.shape
    device = slots.device
    empty = _empty_slot(model, empty_slot, slots)
    plans = [tuple(one) if isinstance(one, Sequence) else (one,) for one in interventions]
    shifted = any(isinstance(edit, Delay) for plan in plans for edit in plan)
    if (entries or shifted) and empty is None:
        raise ValueError("entries and Delay need to know what an empty slot looks like: pass empty_slot [D]")
    gone = None if empty is None else is_empty(slots, empty, empty_tolerance)
    targets = [[_target(edit, slots, gone) for edit in plan] for plan in plans]
    if actions is None and any(isinstance(edit, Act) for plan in plans for edit in plan):
        raise ValueError("Act changes actions, and none were given: pass those of the factual rollout as actions")
    if actions is not None or proprio is not None:
        if frame_skip != 1 or (start != start[0]).any():
            raise ValueError("actions and proprio need frame_skip=1 and the same start in all scenes")
        if (entries or shifted) and proprio is not None:
            raise ValueError("entries and Delay cannot be used with a model that takes proprioception")

    steps = -(-num_frames // frame_skip)
    history = (start // frame_skip).clamp(max=model.config.history_length)  # [B]
    if history.min() < 1:
        raise ValueError(
            f"{int(start.min())} observed frames before start: one step of the model is {frame_skip} frames "
            "(frame_skip), so give at least as many"
        )
    longest = int(history.max())
    seen = start[:, None] + torch.arange(
        -longest * frame_skip, 0, device=device
    )  # below 0 in scenes with less history
    future = start[:, None] + torch.arange(steps * frame_skip, device=device)
    if actions is not None:
        actions = _checked_actions(model, actions, "actions", start, longest, steps, batch)
    if proprio is not None:
        proprio = _to(model, proprio)[:, -longest:]

    # one row per rollout of a scene: the factual one, then the interventions
    rows: dict[str, list] = {name: [] for name in ("slots", "keep", "hidden", "changed", "actions", "given", "where")}
    nothing = torch.zeros(batch, num_slots, dtype=torch.bool, device=device)
    for plan, target in zip([(), *plans], [(), *targets], strict=True):
        edits = list(zip(plan, target, strict=True))
        dropped, hidden, changed, acted = nothing, nothing, nothing, actions
        for edit, slot in edits:
            if isinstance(edit, Act):
                acted = _checked_actions(model, edit.actions, "Act: actions", start, longest, steps, batch)
                continue
            changed = changed | slot
            dropped = dropped | slot if isinstance(edit, Drop) else dropped
            hidden = hidden | slot if isinstance(edit, Mask) else hidden
            if isinstance(edit, Delay) and seen.max() - edit.frames >= total:
                raise ValueError(
                    f"Delay({edit.frames}) needs frame {int(seen.max()) - edit.frames} of the video, which has {total} "
                    "frames: give more, and an earlier start"
                )
        row = {"slots": _edited(slots, seen, edits, empty), "keep": ~dropped, "hidden": hidden, "changed": changed}
        if actions is not None:
            row["actions"] = acted
        if entries or shifted:
            row["given"], row["where"] = _entering(
                slots, seen, future, edits, empty, empty_tolerance, entries, longest * frame_skip
            )
        for name, value in row.items():
            rows[name].append(value)
    stacked = {name: torch.stack(values, dim=1) for name, values in rows.items() if values}  # [B, 1 + I, ...]
    if "where" in stacked:
        stacked["shown"] = stacked["where"].any(dim=(1, 3))[:, None].expand(-1, len(plans) + 1, -1)
    short = history <= model.config.visible_prefix
    if (stacked["hidden"].any(dim=2) & short[:, None]).any():
        raise ValueError(
            f"Mask hides frames after the first {model.config.visible_prefix}, and only {int(history.min())} steps were "
            "observed: give more frames, or use Drop or Empty"
        )
    if not stacked["keep"].any(dim=2).all():
        raise ValueError("all slots of a scene were dropped: keep at least one")

    was_training = model.training
    model.eval()
    try:
        imagined = _roll_rows(model, stacked, history, steps, frame_skip, proprio, match_slots, batch_size)
        imagined = imagined[:, :, :num_frames]
    finally:
        model.train(was_training)
    factual, others = imagined[:, 0], imagined[:, 1:]
    present, changed = stacked["keep"][:, 1:], stacked["changed"][:, 1:]
    effect = (others - factual[:, None]).square().sum(-1).sqrt()
    last = slots[torch.arange(batch, device=device), start - 1].float()
    if effect_threshold is None:
        pairs = max(num_slots * (num_slots - 1), 1)
        threshold = 0.1 * torch.cdist(last, last).sum((1, 2)) / pairs
    else:
        threshold = torch.full((batch,), float(effect_threshold), device=device)
    far = (effect > threshold[:, None, None, None]) & (present & ~changed)[:, :, None]
    affected = far.any(dim=2)
    return Imagination(
        factual=factual,
        slots=others,
        present=present,
        changed=changed,
        effect=effect,
        threshold=threshold,
        affected=affected,
        affected_from=torch.where(affected, far.byte().argmax(dim=2), -1),
        start=start,
        history=history,
    )


@torch.no_grad()
def extend_video(
    model: CJepaModel,
    slots: torch.Tensor,
    *,
    num_frames: int = 32,
    frame_skip: int | None = None,
    match_slots: bool = False,
    batch_size: int = 256,
) -> torch.Tensor:
    """
    Videos [B, T, N, D] with `num_frames` imagined ones after them, [B, T + num_frames, N, D] float32; the observed ones
    unchanged. With T = 128 and 32 frames this is the released code's rollout for CLEVRER (SlotFormer's protocol).

    Args:
        frame_skip: default: that of the model's configuration.

    Raises `ValueError` for a video shorter than history_length * frame_skip frames.
    """
    skip = model.config.frame_skip if frame_skip is None else frame_skip
    needed = model.config.history_length * skip
    if slots.ndim == 4 and slots.shape[1] < needed:
        raise ValueError(
            f"videos of {slots.shape[1]} frames: the model's history is {model.config.history_length} steps of {skip} "
            f"frames, so at least {needed} are needed (imagine() takes fewer)"
        )
    result = imagine(
        model, slots, num_frames=num_frames, frame_skip=skip, match_slots=match_slots, batch_size=batch_size
    )
    return torch.cat([slots.to(result.factual), result.factual], dim=1)


@torch.no_grad()
def remove_object(
    model: CJepaModel,
    slots: torch.Tensor,
    slot: torch.Tensor,
    first: torch.Tensor,
    *,
    empty_slot: torch.Tensor,
    frame_skip: int | None = None,
    match_slots: bool = False,
    batch_size: int = 256,
) -> torch.Tensor:
    """
    Videos [B, T, N, D] as they would be without an object, [B, T, N, D]: what was observed with its slot empty before a
    frame, imagined from there on. Objects that enter later are shown to the model from the video when they do.

    Args:
        slot: int64 [B], the object.
        first: int64 [B], first imagined frame; T: nothing is imagined. `first_contact` finds how long what was observed
            holds without the object.
        empty_slot: [D], what a slot without object looks like.
        frame_skip: default: that of the model's configuration.
    """
    total, rows = slots.shape[1], torch.arange(len(slots), device=slots.device)
    skip = model.config.frame_skip if frame_skip is None else frame_skip
    empty = empty_slot.to(slots)
    videos = slots.clone()
    videos[rows, :, slot] = empty
    going = (first < total).nonzero().squeeze(1)
    if not len(going):
        return videos
    # those that begin together first: a batch imagines as far as its earliest one needs
    for part in going[first[going].argsort(stable=True)].split(batch_size):
        begun = first[part]
        imagined = imagine(
            model,
            slots[part],
            [Empty(slot[part])],
            num_frames=int(total - begun.min()),
            start=begun,
            frame_skip=skip,
            empty_slot=empty,
            entries=True,
            match_slots=match_slots,
        ).slots[:, 0]
        frame = torch.arange(total, device=slots.device) - begun[:, None]  # of the rollout; below 0: observed
        chosen = imagined[torch.arange(len(part), device=slots.device)[:, None], frame.clamp(min=0)]
        videos[part] = torch.where((frame >= 0)[..., None, None], chosen.to(videos), videos[part])
    videos[rows, :, slot] = empty  # it is gone, whatever a rollout drifts to
    return videos


def is_empty(slots: torch.Tensor, empty_slot: torch.Tensor, tolerance: float = 0.1) -> torch.Tensor:
    """
    Which slots [B, T, N, D] hold no object, bool [B, T, N]: nearer to `empty_slot` [D] than `tolerance` times the largest
    distance from it in the scene [T, N].
    """
    distance = (slots.float() - empty_slot.float().to(slots.device)).square().sum(-1).sqrt()
    return distance <= tolerance * distance.amax(dim=(1, 2), keepdim=True)


def first_contact(
    positions: torch.Tensor, slot: torch.Tensor, distance: float, present: torch.Tensor | None = None
) -> torch.Tensor:
    """
    First frame at which an object comes within `distance` of another one, int64 [B], -1 if it never does.

    Args:
        positions: [B, T, N, 2].
        slot: int64 [B], the object.
        distance: in the unit of the positions, between centers. Somewhat above touching, so that no contact is late: 0.75
            in the collision world, whose spheres touch at 0.56 and cubes at up to 0.74.
        present: bool [B, T, N], where slots hold an object; others touch nothing. Leave out slots such as the background.
    """
    rows = torch.arange(len(positions), device=positions.device)
    near = (positions - positions[rows, :, slot][:, :, None]).square().sum(-1) < distance**2  # NaN is not near
    near[rows, :, slot] = False
    if present is not None:
        near &= present & present[rows, :, slot][:, :, None]
    touched = near.any(dim=-1)
    return torch.where(touched.any(dim=1), touched.byte().argmax(dim=1), -1)


# ----------------------------------------------------------------------------------------------------------- checks


def _to(model: CJepaModel, value) -> torch.Tensor:
    return torch.as_tensor(value).to(model.device, model.dtype)


def _checked_slots(model, slots, start, num_frames, frame_skip) -> tuple[torch.Tensor, torch.Tensor]:
    if not torch.is_tensor(slots) or slots.ndim != 4 or slots.shape[-1] != model.config.slot_size:
        shape = tuple(slots.shape) if torch.is_tensor(slots) else type(slots).__name__
        raise ValueError(f"slots are {shape}: expected a tensor (B, T, N, D={model.config.slot_size})")
    for name, value in (("num_frames", num_frames), ("frame_skip", frame_skip)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")
    slots = _to(model, slots)
    batch, total = slots.shape[:2]
    start = torch.as_tensor(total if start is None else start, device=slots.device).long()
    if start.ndim > 1 or (start.ndim == 1 and len(start) != batch):
        raise ValueError(f"start has shape {tuple(start.shape)}: expected one number or ({batch},)")
    start = start.expand(batch)
    if not batch or start.min() < 1 or start.max() > total:
        raise ValueError(f"start={start.tolist()} must lie in 1 ... {total}, the number of observed frames")
    return slots, start


def _empty_slot(model, empty_slot, slots) -> torch.Tensor | None:
    if empty_slot is None:
        empty_slot = getattr(model.slot_encoder, "empty_slot", None)
    if empty_slot is None:
        return None
    empty_slot = torch.as_tensor(empty_slot).to(slots)
    if empty_slot.shape != slots.shape[-1:] or not empty_slot.isfinite().all():
        raise ValueError(f"empty_slot has shape {tuple(empty_slot.shape)}: expected ({slots.shape[-1]},), finite")
    return empty_slot


def _target(edit: Intervention, slots: torch.Tensor, gone: torch.Tensor | None) -> torch.Tensor | None:
    """Which slots the intervention is about, bool [B, N]; None for actions."""
    if isinstance(edit, Act):
        return None
    if not isinstance(edit, Drop | Empty | Mask | Replace | Delay):
        raise ValueError(f"{edit!r} is no intervention: expected Drop, Empty, Mask, Replace, Delay or Act")
    batch, _, num_slots, _ = slots.shape
    slot = torch.as_tensor(edit.slot, device=slots.device)
    kind = type(edit).__name__
    if slot.is_floating_point() or slot.dtype == torch.bool or slot.ndim > 1 or slot.numel() not in (1, batch):
        raise ValueError(f"{kind}: slot={edit.slot!r} must be an integer or [{batch}] integers, one per scene")
    if slot.min() < 0 or slot.max() >= num_slots:
        raise ValueError(f"{kind}: slot={edit.slot!r} must lie in 0 ... {num_slots - 1}")
    slot = slot.reshape(-1).expand(batch)
    if gone is not None:
        rows = torch.arange(batch, device=slots.device)
        nothing = gone[rows, :, slot].all(dim=1)
        if nothing.any():
            scene = int(nothing.byte().argmax())
            here = (~gone[scene].all(dim=0)).nonzero().flatten().tolist()
            raise ValueError(
                f"{kind}: slot {int(slot[scene])} of scene {scene} is empty in all frames, so there is no object to change; "
                f"the slots with objects are {here}"
            )
    return torch.nn.functional.one_hot(slot, num_slots).bool()


def _checked_actions(model, actions, name, start, history, steps, batch) -> torch.Tensor:
    """[B, history + steps - 1, A]: those the rollout takes."""
    if not model.config.action_size:
        raise ValueError(f"{name}: this model was built without actions, leave them out")
    actions, first = _to(model, actions), int(start[0])
    actions = actions.expand(batch, -1, -1) if actions.ndim == 2 else actions
    expected = (batch, first + steps - 1, model.config.action_size)
    if tuple(actions.shape) != expected:
        raise ValueError(
            f"{name} have shape {tuple(actions.shape)}: expected {expected}, start + num_frames - 1 steps"
        )
    return actions[:, first - history :]


# ------------------------------------------------------------------------------------------------------------ edits


def _edited(slots, frames, edits, empty) -> torch.Tensor:
    """Slots [B, F, N, D] of frames [B, F] after the edits; outside the known frames the nearest."""
    total = slots.shape[1]
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    result = slots[rows, frames.clamp(0, total - 1)]
    for edit, target in edits:
        if isinstance(edit, Empty):
            if empty is None:
                raise ValueError(
                    "Empty needs to know what an empty slot looks like: pass empty_slot [D] (the mean of slots "
                    "without object), or use Drop"
                )
            value = empty.expand_as(result)
        elif isinstance(edit, Replace):
            value = _replacement(edit.by, slots, frames)[:, :, None]
        elif isinstance(edit, Delay):
            source = frames - edit.frames
            value = slots[rows, source.clamp(0, total - 1)]
            value = torch.where((source < 0)[:, :, None, None], empty, value)
        else:
            continue
        result = torch.where(target[:, None, :, None], value, result)
    return result


def _replacement(by, slots, frames) -> torch.Tensor:
    """[B, F, D] of frames [B, F]."""
    batch, total, _, size = slots.shape
    by = torch.as_tensor(by).to(slots)
    known = {(size,): by.dim() == 1, (batch, size): by.dim() == 2, (total, size): by.dim() == 2}
    shape = tuple(by.shape)
    if shape not in known and shape != (batch, total, size):
        raise ValueError(
            f"Replace: by has shape {shape}: expected ({size},), ({batch}, {size}), ({total}, {size}) or "
            f"({batch}, {total}, {size})"
        )
    if not by.isfinite().all():
        raise ValueError("Replace: by holds NaN or infinite numbers")
    if by.ndim == 1:
        return by.expand(*frames.shape, size)
    if by.ndim == 2 and len(by) == total:  # with as many scenes as frames: frames
        by = by.expand(batch, total, size)
    elif by.ndim == 2:
        return by[:, None].expand(*frames.shape, size)
    rows = torch.arange(batch, device=slots.device)[:, None]
    return by[rows, frames.clamp(0, total - 1)]


def _entering(slots, seen, future, edits, empty, tolerance, entries, window):
    """Slots [B, F, N, D] that the rollout is given and where, bool [B, F, N]: those of objects that enter after the start."""
    frames = torch.cat([seen, future], dim=1)
    total, first = slots.shape[1], seen.shape[1]
    track = _edited(slots, frames, edits, empty)
    limit = torch.full((len(slots), slots.shape[2]), total, device=slots.device)  # first frame that is not known
    asked = torch.full_like(limit, bool(entries), dtype=torch.bool)
    for edit, target in edits:
        if isinstance(edit, Delay):
            limit, asked = torch.where(target, total + edit.frames, limit), asked | target
    there = ~is_empty(track, empty, tolerance) & (frames[:, :, None] < limit[:, None])
    entered = torch.where(there.any(dim=1), there.byte().argmax(dim=1), frames.shape[1])  # [B, N]
    place = torch.arange(frames.shape[1], device=slots.device)[None, :, None]
    where = there & (asked & (entered > 0))[:, None] & (place < (entered + window)[:, None])
    return track[:, first:], where[:, first:]


# --------------------------------------------------------------------------------------------------------- rollouts


def _roll_rows(model, rows, history, steps, skip, proprio, match_slots, batch_size) -> torch.Tensor:
    """Frames [B, R, steps * skip, N, D] float32 of rows [B, R, ...]; equally long and large ones go together."""
    batch, count, _, num_slots, size = rows["slots"].shape
    scene = torch.arange(batch, device=rows["slots"].device).repeat_interleave(count)
    flat = {name: value.flatten(0, 1) for name, value in rows.items()}
    kind = torch.stack([flat["keep"].sum(dim=1), history[scene]], dim=1)  # slots and steps that the model sees
    result = torch.full((batch * count, steps * skip, num_slots, size), float("nan"), device=kind.device)
    for number, length in kind.unique(dim=0).tolist():
        rows_of_kind = (kind == kind.new_tensor([number, length])).all(dim=1).nonzero().flatten()
        for index in rows_of_kind.split(max(batch_size // skip, 1)):
            places = flat["keep"][index].nonzero()[:, 1].reshape(-1, number)  # [R, number]

            def pick(name, index=index, places=places):
                if name not in flat:
                    return None
                value = flat[name][index]
                if name == "hidden":
                    return value.gather(1, places)
                place = places[:, None].expand(-1, value.shape[1], -1)
                return value.gather(2, place[..., None].expand(*place.shape, size) if value.ndim == 4 else place)

            frames = _roll(
                model,
                pick("slots")[:, -length * skip :],
                steps,
                skip,
                hidden=pick("hidden"),
                given=pick("given"),
                where=pick("where"),
                shown=flat["shown"][index] if "shown" in flat else None,
                actions=flat["actions"][index] if "actions" in flat else None,
                proprio=None if proprio is None else proprio[scene[index]],
                match_slots=match_slots,
            )
            result[index[:, None], :, places] = frames.transpose(1, 2).float()
    return result.unflatten(0, (batch, count))


def _roll(model, slots, steps, skip, *, hidden, given, where, shown, actions, proprio, match_slots) -> torch.Tensor:
    """
    [R, steps * skip, N, D] after slots [R, history * skip, N, D]: `skip` rollouts of every row, interleaved. Where `where`
    [R, F, N], slots are `given` [R, F, N, D]; `shown` [R, F] tells in which frames that is so in some rollout of the scene.
    """
    count = len(slots)

    def split(x):  # [R, F * skip, ...] -> [R * skip, F, ...]
        return x.unflatten(1, (-1, skip)).transpose(1, 2).flatten(0, 1)

    history = split(slots)
    if hidden.any():
        hidden = hidden.repeat_interleave(skip, dim=0)
        seen = None if actions is None else actions[:, : history.shape[1]]
        filled = model(history, actions=seen, proprio=proprio, slot_mask=hidden).predicted_slots
        unseen = (
            hidden[:, None]
            & (torch.arange(history.shape[1], device=hidden.device) >= model.config.visible_prefix)[None, :, None]
        )
        history = torch.where(unseen[..., None], filled[:, : history.shape[1]], history)
    if where is None:
        imagined = model.rollout(
            history, actions=actions, proprio=proprio, num_steps=steps, match_slots=match_slots
        ).slots
    else:
        given, where = split(given), split(where)
        shown = split(shown)
        first, ahead = history.shape[1], model.config.prediction_length
        whole = torch.cat([history, torch.zeros_like(given)], dim=1)

        def go_on(rows, step, end):
            seen = slice(max(first + step - model.config.history_length, 0), first + step)
            part = None if actions is None else actions[rows, seen.start : first + end - 1]
            new = model.rollout(whole[rows, seen], actions=part, num_steps=end - step, match_slots=match_slots).slots
            place = where[rows, step:end, :, None]
            whole[rows, first + step : first + end] = torch.where(place, given[rows, step:end], new)

        for step in range(0, steps, ahead):
            end = min(step + ahead, steps)
            go_on(slice(None), step, end)
            for later in range(step + 1, end):  # what follows something shown is predicted again, with that in view
                if len(rows := shown[:, later - 1].nonzero().flatten()):
                    go_on(rows, later, end)
        imagined = whole[:, first:]
    return imagined.unflatten(0, (count, skip)).transpose(1, 2).flatten(1, 2)
