"""
CF-rollout: does a world model imagine what happens when an object is taken away? `cjepa-hf evaluate --protocol cf-rollout`.

The scenes of the protocol are simulated as they are and without each object, so that the truth is known. A model sees slots
of the video as it was, one object is removed from them, and what it imagines is compared with the simulation: where the
objects are that the removal displaces, and which pairs collide. Controls that imagine nothing, or not this, stand beside.

Axes: V videos, R removals (rows), F frames of 1/25 s, J steps of 4 frames (step j of a row is frame `phase + 4 j`), N slots,
the first 6 of which are the objects by their number, D slot size, 15 pairs (`data.state_slots.OBJECT_PAIRS`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.slots import load_slot_dataset
from ..data.state_slots import OBJECT_PAIRS, STATE_ENCODER
from ..imagination import Drop, Empty, Mask, imagine, is_empty
from ..models.cjepa import CJepaModel
from ..simulators.rendering import MAX_OBJECTS, OBJECT_RADIUS, SHAPES, VIEW_SIZE
from ..slot_probe import SlotProbe
from .contacts import ContactReadout, best_threshold, event_counts
from .metrics import success_rate
from .object_slots import PixelSlots, StateSlots, dataset_scenes
from .protocols import cf_rollout_world, load_protocol, measured_on

NEVER = 10_000  # frame of what does not happen
VIDEO_FRAMES, FRAMES = 128, 140  # of a video; simulated, so that paths go on a little after its end
STEPS, VIDEO_STEPS = 34, 32
OPERATORS = {"empty": Empty, "drop": Drop, "mask": Mask}
BOOTSTRAPS = 1000
_PAIR = np.array(OBJECT_PAIRS)  # [15, 2]


# ------------------------------------------------------------------------------------------------------------- truth


@dataclass
class Scenes:
    """
    What happens in the videos. states float32 [V, 128, 60], positions [V, F, 6, 2] and in_view bool [V, F, 6],
    meetings int [V, 15] (frame of a pair's first contact or NEVER), contact int [V, 6] (of an object's).
    """

    states: np.ndarray
    positions: np.ndarray
    in_view: np.ndarray
    meetings: np.ndarray
    contact: np.ndarray


@dataclass
class Removals:
    """
    One row per removal: scene [R], gone [R], contact [R] (its first one in the video), wrong [R] (another object that is
    in view then, -1: none); and what happens without it: states, positions, in_view, meetings as in [`Scenes`]; unsure
    bool [R, 15]. questions: (row, pairs, negated, answers bool) of every question about a row.
    """

    scene: np.ndarray
    gone: np.ndarray
    contact: np.ndarray
    wrong: np.ndarray
    states: np.ndarray
    positions: np.ndarray
    in_view: np.ndarray
    meetings: np.ndarray
    unsure: np.ndarray
    questions: list[tuple[int, np.ndarray, bool, np.ndarray]]


def _episode_arrays(episode) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rows = episode.states.reshape(len(episode.positions), MAX_OBJECTS, -1)
    positions = rows[..., 1:3].astype(np.float32)
    in_view = (rows[..., 0] > 0.5) & (np.abs(rows[..., 1:3]) < np.array(VIEW_SIZE) / 2).all(-1)
    meetings = np.full(len(OBJECT_PAIRS), NEVER)
    for c in episode.collisions:
        place = OBJECT_PAIRS.index(c.pair)
        meetings[place] = min(meetings[place], c.frame)
    return episode.states[:VIDEO_FRAMES].astype(np.float32), positions, in_view, meetings


def simulate_protocol(protocol: Mapping[str, Any], num_scenes: int | None = None) -> tuple[Scenes, Removals]:
    """The first scenes of the protocol (default: all), with every removal that its rule names."""
    tasks = protocol["tasks"]
    if num_scenes is not None and not 1 <= num_scenes <= len(tasks):
        raise ValueError(f"num_tasks={num_scenes}: protocol {protocol['name']} has {len(tasks)} scenes")
    low, high = protocol["first_contact"]
    videos, rows, questions = [], [], []
    for number, task in enumerate(tasks[:num_scenes]):
        world = cf_rollout_world(task["objects"])
        video = _episode_arrays(world.simulate(FRAMES))
        contact = np.array([video[3][(k == _PAIR).any(1)].min() for k in range(MAX_OBJECTS)])
        videos.append((*video, contact))
        for gone in world.ids:
            if not low <= contact[gone] <= high:
                continue
            without = _episode_arrays(world.without(gone).simulate(FRAMES))
            seen = np.flatnonzero(video[2][contact[gone]])
            others = np.concatenate([seen[seen > gone], seen[seen < gone]])
            unsure = np.zeros(len(OBJECT_PAIRS), bool)
            for pair in task["unsure"].get(str(gone), ()):
                unsure[OBJECT_PAIRS.index(tuple(pair))] = True
            for question in task["questions"]:
                if question["removed"] == gone:
                    pairs = np.array([OBJECT_PAIRS.index(tuple(pair)) for pair in question["pairs"]])
                    answers = np.array([answer == "correct" for answer in question["answers"]])
                    questions.append((len(rows), pairs, question["negated"], answers))
            rows.append((number, gone, contact[gone], others[0] if len(others) else -1, *without, unsure))
    scene, gone, contact, wrong, states, positions, in_view, meetings, unsure = map(np.array, zip(*rows))
    removals = Removals(scene, gone, contact, wrong, states, positions, in_view, meetings, unsure, questions)
    return Scenes(*map(np.stack, zip(*videos))), removals


# ------------------------------------------------------------------------------------------------------------- paths


@dataclass
class Paths:
    """Where objects are in the steps of every row: positions float32 [R, 34, 6, 2], present bool [R, 34, 6]."""

    positions: np.ndarray
    present: np.ndarray

    def without(self, objects: np.ndarray) -> "Paths":
        """The same with object `objects[r]` absent from row r (-1: none)."""
        present = self.present.copy()
        rows = np.flatnonzero(objects >= 0)
        present[rows, :, objects[rows]] = False
        return Paths(self.positions, present)

    def held(self) -> np.ndarray:
        """Positions where absent objects stay where they were last seen (first, before they were seen)."""
        step = np.arange(self.present.shape[1])[None, :, None]
        last = np.maximum.accumulate(np.where(self.present, step, -1), axis=1)
        first = np.where(self.present.any(1), self.present.argmax(1), 0)[:, None]
        index = np.where(last < 0, first, last)
        return np.take_along_axis(self.positions, index[..., None], axis=1)


@dataclass
class Observed:
    """
    Rows as a model sees them: slots [R, 32, N, D] with everything after `start` [R] that may not be seen replaced by the
    empty slot, frames int [R, 34] of the steps, paths of what is seen, given bool [R, 34, 6] where an object may be seen.
    """

    slots: torch.Tensor
    start: np.ndarray
    frames: np.ndarray
    paths: Paths
    given: np.ndarray


def read_paths(probe: SlotProbe, slots: torch.Tensor) -> Paths:
    """Paths of slots [R, J, N, D], whose first 6 are the objects; NaN slots are absent."""
    slots = slots[:, :, :MAX_OBJECTS]
    positions, present = probe.positions(slots), probe.present(slots)
    return Paths(torch.nan_to_num(positions).cpu().numpy(), present.cpu().numpy())


def video_steps(slots: torch.Tensor, scene: np.ndarray, phase: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Slots [R, 32, N, D] of the steps of rows, and their frames int [R, 34]."""
    frames = phase[:, None] + 4 * np.arange(STEPS)
    rows = torch.from_numpy(scene)[:, None]
    return slots[rows, torch.from_numpy(frames[:, :VIDEO_STEPS])], frames


def observe(
    slots: torch.Tensor,
    probe: SlotProbe,
    scene: np.ndarray,
    contact: np.ndarray,
    start: np.ndarray,
    phase: np.ndarray,
    *,
    entry_steps: int,
) -> Observed:
    """What may be seen: all before `start`, and who enters later for `entry_steps` steps, before any contact."""
    steps, frames = video_steps(slots, scene, phase)
    paths = read_paths(probe, steps)
    step = np.arange(STEPS)[None, :, None]
    present = np.pad(paths.present, ((0, 0), (0, STEPS - VIDEO_STEPS), (0, 0)))
    entered = np.where(present.any(1), present.argmax(1), STEPS)[:, None]
    entering = (entered > 0) & (step < entered + entry_steps) & (frames[..., None] <= contact[scene][:, None])
    given = present & ((step < start[:, None, None]) | entering)
    hidden = torch.from_numpy(~given[:, :VIDEO_STEPS] & (step[:, :VIDEO_STEPS] >= start[:, None, None]))
    steps = steps.clone()
    steps[:, :, :MAX_OBJECTS][hidden] = probe.empty_slot.to(steps)
    positions = np.pad(paths.positions, ((0, 0), (0, STEPS - VIDEO_STEPS), (0, 0), (0, 0)))
    return Observed(steps, start, frames, Paths(positions, given), given)


def constant_velocity(observed: Observed) -> Paths:
    """Every object goes on as in the last two steps in which it was seen; who left the view does not come back."""
    positions, given = observed.paths.positions.copy(), observed.given
    first = np.where(given.any(1), given.argmax(1), STEPS)  # [R, 6]
    for j in range(1, STEPS):
        before, last = positions[:, j - 2], positions[:, j - 1]
        moved = np.where((j - 2 >= first)[..., None], 2 * last - before, last)
        positions[:, j] = np.where(given[:, j][..., None], positions[:, j], moved)
    inside = (np.abs(positions) < np.array(VIEW_SIZE) / 2).all(-1)
    seen = np.maximum.accumulate(given, axis=1)
    later = np.arange(STEPS)[None, :, None] >= observed.start[:, None, None]
    return Paths(positions, np.where(later, seen & inside, given))


def imagined_paths(
    model: CJepaModel,
    observed: Observed,
    probe: SlotProbe,
    edits: Mapping[str, Sequence[tuple[type, np.ndarray]]],
    *,
    batch_size: int = 256,
    progress: str | None = None,
) -> dict[str, Paths]:
    """
    Paths without intervention (key "none") and with each of `edits`: pairs of an intervention of `cjepa_hf.imagination`
    and its object in every row, int [R]. An object that the slots never show cannot be removed: nothing changes there.
    Rows with similar starts go together; all rollouts of a row are in one batch.
    """
    count, names = len(observed.start), list(edits)
    results = {
        name: Paths(observed.paths.positions.copy(), observed.paths.present.copy()) for name in ["none", *names]
    }
    order = np.argsort(observed.start, kind="stable")
    size = max(batch_size // (1 + len(names)), 1)
    for first in tqdm(range(0, count, size), desc=progress, disable=progress is None, leave=False):
        rows = order[first : first + size]
        start = torch.from_numpy(observed.start[rows])
        steps = STEPS - int(start.min())
        slots = observed.slots[torch.from_numpy(rows)].to(model.device)
        shown = ~is_empty(slots, probe.empty_slot).all(dim=1)  # [B, N]
        plans, unknown = [], []
        for name in names:
            plan, missing = [], np.zeros(len(rows), bool)
            for kind, objects in edits[name]:
                target = torch.from_numpy(objects[rows]).to(model.device)
                there = shown.gather(1, target[:, None])[:, 0]
                missing |= ~there.cpu().numpy()
                plan.append(kind(torch.where(there, target, shown.byte().argmax(dim=1))))
            plans.append(plan)
            unknown.append(missing)
        result = imagine(
            model,
            slots,
            plans,
            num_frames=steps,
            start=start,
            empty_slot=probe.empty_slot,
            entries=True,
            batch_size=batch_size,
        )
        for place, name in enumerate(["none", *names]):
            imagined = result.factual
            if place:
                without = torch.from_numpy(unknown[place - 1]).to(imagined.device)
                imagined = torch.where(without[:, None, None, None], imagined, result.slots[:, place - 1])
            found = read_paths(probe, imagined)
            for j in range(STEPS):
                k = j - observed.start[rows]  # the imagined frame that is step j
                ok = np.flatnonzero((k >= 0) & (k < steps))
                results[name].positions[rows[ok], j] = found.positions[ok, k[ok]]
                results[name].present[rows[ok], j] = found.present[ok, k[ok]]
    return results


# ------------------------------------------------------------------------------------------------------------ scores


class VideoBootstrap:
    """Resamples videos; the same resamples for every score, so that differences are paired."""

    def __init__(self, num_videos: int, seed: int = 0, count: int = BOOTSTRAPS):
        draws = np.random.default_rng(seed).integers(num_videos, size=(count, num_videos))
        self.weights = np.stack([np.bincount(draw, minlength=num_videos) for draw in draws]).astype(np.float64)
        self.num_videos = num_videos

    def totals(self, values: np.ndarray, video: np.ndarray) -> np.ndarray:
        """Sums [1 + count]: of all values, then of each resample; values [n] belong to the videos [n]."""
        sums = np.bincount(video, weights=values, minlength=self.num_videos)
        return np.concatenate([[sums.sum()], self.weights @ sums])

    def mean(self, values: np.ndarray, video: np.ndarray) -> np.ndarray:
        """Means [1 + count]; NaN where a resample has no value."""
        with np.errstate(invalid="ignore"):
            return self.totals(values, video) / self.totals(np.ones(len(video)), video)


def interval(samples: np.ndarray, n: int | None = None) -> dict[str, float]:
    """{"value", "low", "high"}: the first sample, with the 2.5 and 97.5 % points of the others; NaN is null."""
    others = samples[1:][np.isfinite(samples[1:])]
    low, high = np.quantile(others, [0.025, 0.975]) if len(others) else (np.nan, np.nan)
    values = {"value": samples[0], "low": low, "high": high}
    result: dict[str, Any] = {name: float(v) if np.isfinite(v) else None for name, v in values.items()}
    return result if n is None else result | {"n": int(n)}


@dataclass
class Questions:
    """
    What is asked of rows [R] from `start` on. asked bool [R, 15], video and truth bool [R, 15] (the pair meets after the
    start, as it was and without the object), third bool [R, 15].
    """

    asked: np.ndarray
    video: np.ndarray
    truth: np.ndarray
    third: np.ndarray


def make_pair_questions(scenes: Scenes, removals: Removals, first_frame: np.ndarray, exists: np.ndarray) -> Questions:
    """
    Args:
        first_frame: int [R], the last observed frame: contacts from it on are asked about.
        exists: bool [R, 6], objects that are seen at some time.
    """
    factual, without = scenes.meetings[removals.scene], removals.meetings
    first = first_frame[:, None]
    both = exists[:, _PAIR].all(-1) & (_PAIR[None] != removals.gone[:, None, None]).all(-1)
    asked = both & ~removals.unsure & (factual >= first)
    end = VIDEO_FRAMES
    video, truth = (factual < end) & asked, (without < end) & asked
    when = np.where(truth, without, factual)  # of an informative pair
    third = np.zeros_like(asked)
    for place, (a, b) in enumerate(OBJECT_PAIRS):
        for other, pair in enumerate(OBJECT_PAIRS):
            if other != place and {a, b} & set(pair):
                met = without[:, other]
                third[:, place] |= (met >= first[:, 0]) & (met < when[:, place])
    return Questions(asked, video, truth, third & (video != truth))


def score_pairs(
    questions: Questions, verdict: np.ndarray, video: np.ndarray, bootstrap: VideoBootstrap
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Scores of verdicts bool [R, 15] on what is asked, rows of the videos [R]; and samples [1 + count] for differences."""
    right = verdict == questions.truth
    rows = np.broadcast_to(video[:, None], right.shape)
    cells, samples = {}, []
    for name, factual, truth in (
        ("no -> no", False, False),
        ("yes -> yes", True, True),
        ("yes -> no", True, False),
        ("no -> yes", False, True),
    ):
        chosen = questions.asked & (questions.video == factual) & (questions.truth == truth)
        cells[name] = success_rate(right[chosen]) if chosen.any() else None
        samples.append(bootstrap.mean(right[chosen].astype(float), rows[chosen]))
    found = {"cell_mean": np.mean(samples, axis=0)}
    changed = questions.asked & (questions.video != questions.truth)
    scores: dict[str, Any] = {"cell_mean": interval(found["cell_mean"], questions.asked.sum()), "cells": cells}
    for name, chosen in (("third_object", questions.third & changed), ("informative", changed)):
        found[name] = bootstrap.mean(right[chosen].astype(float), rows[chosen])
        scores[name] = success_rate(right[chosen]) | {"videos": interval(found[name])} if chosen.any() else None
    return scores, found


def score_questions(removals: Removals, verdict: np.ndarray) -> dict[str, Any] | None:
    """Questions of the video, all of whose options are judged right, and options; verdict bool [R, 15] of the whole video."""
    judged = [((verdict[row, pairs] != negated) == answers) for row, pairs, negated, answers in removals.questions]
    if not judged:
        return None
    return {
        "questions": success_rate([one.all() for one in judged]),
        "options": success_rate(np.concatenate(judged)),
    }


def score_positions(
    paths: Paths,
    scenes: Scenes,
    removals: Removals,
    observed: Observed,
    horizons: Sequence[int],
    bootstrap: VideoBootstrap,
    left_out: np.ndarray | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """
    Mean distance to where displaced objects truly are, world units, `horizon` frames after the first contact; without the
    object `left_out[r]` of a row (-1: none).
    """
    held, rows = paths.held(), np.arange(len(removals.scene))
    scores, samples = {}, {}
    seen = np.maximum.accumulate(observed.given, axis=1)
    for horizon in horizons:
        step = (removals.contact - observed.frames[:, 0]) // 4 + horizon // 4
        ok = step < STEPS
        frame = np.minimum(observed.frames[rows, np.minimum(step, STEPS - 1)], FRAMES - 1)
        ok &= frame < VIDEO_FRAMES
        step = np.minimum(step, STEPS - 1)
        truth, actual = removals.positions[rows, frame], scenes.positions[removals.scene, frame]
        displaced = np.linalg.norm(truth - actual, axis=-1) > OBJECT_RADIUS
        chosen = displaced & removals.in_view[rows, frame] & seen[rows, step] & ok[:, None]
        chosen[rows, removals.gone] = False
        if left_out is not None:
            chosen[rows[left_out >= 0], left_out[left_out >= 0]] = False
        error = np.linalg.norm(held[rows, step] - truth, axis=-1)[chosen]
        video = np.broadcast_to(removals.scene[:, None], chosen.shape)[chosen]
        samples[str(horizon)] = bootstrap.mean(error.astype(np.float64), video)
        scores[str(horizon)] = interval(samples[str(horizon)], chosen.sum())
    return scores, samples


# ------------------------------------------------------------------------------------------------------------ the run


def evaluate_cf_rollout(
    models: Sequence[str],
    *,
    dataset: str,
    protocol: str = "cf-rollout",
    num_tasks: int | None = None,
    starts: Sequence[str] = ("B", "A"),
    operators: Sequence[str] = ("empty",),
    slot_encoder: str | None = None,
    text_only: str | None = None,
    num_training_videos: int = 200,
    num_tuning_videos: int = 100,
    occluded: bool = False,
    true_videos: bool = True,
    batch_size: int = 256,
    device: str = "cpu",
    progress: bool = True,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """
    Every model and every control on the same removals.

    Args:
        models: folders or Hub ids of [`CJepaModel`]; all of them take the same slots.
        dataset: state slots with the splits train and validation (`cjepa-hf extract SCENES --encoder state`): states that
            the probe and the readout of contacts learn from, and whose factual rollouts choose thresholds.
        starts: "B" from the branch point (the headline), "A" from the beginning.
        operators: how the object is taken away, of `OPERATORS`.
        slot_encoder: folder or Hub id; default: the one in the first model, and if it has none slots are true states.
        text_only: ALOE that was trained without slots.
        num_training_videos, num_tuning_videos: of the splits train and validation.
        occluded: also hide one object's history after its first two steps, from start B ("occluded" in the results).
        true_videos: also read the true counterfactual videos through the slot encoder: the same control for every model, and
            most of the time that it takes from pixels.
        on_row: called with the results so far after every row.

    Returns:
        {"rows": one dict per system and start with `position_error`, `cell_mean`, `cells`, `third_object`, `informative`
        and `questions`; "factual": events of videos imagined as they are; "against": differences of each model to
        constant velocity, to copying the video and to the first model; "slots": what reads objects from slots, and how well; ...}.
    """
    rules = load_protocol(protocol)
    unknown = [name for name in operators if name not in OPERATORS] + [name for name in starts if name not in "AB"]
    if unknown:
        raise ValueError(f"{unknown[0]!r}: expected operators of {sorted(OPERATORS)}, starts A and B")
    if not models:
        raise ValueError("no model given: name at least one folder or Hub id")
    nets: dict[str, CJepaModel] = {}
    for name in models:
        net = CJepaModel.from_pretrained(name).eval().to(device)
        if net.config.frame_skip != rules["frame_skip"] or net.config.action_size or net.config.proprio_size:
            raise ValueError(
                f"{name} has steps of {net.config.frame_skip} frames, actions of {net.config.action_size} and proprioception "
                f"of {net.config.proprio_size}: {protocol} takes steps of {rules['frame_skip']} frames and nothing else"
            )
        nets[_label(name, nets)] = net
    source = _slot_source(slot_encoder, models[0], list(nets.values()), dataset, device)
    scenes, removals = simulate_protocol(rules, num_tasks)
    bootstrap = VideoBootstrap(len(scenes.states))

    # what reads positions from slots, and contacts from paths, learns from videos of the training split
    states, contacts = dataset_scenes(dataset, "train", num_training_videos, ("state", "contacts"))
    probe = source.fit(states, progress=progress)
    slots = source.slots(states, progress=progress)
    readout, num_training = ContactReadout.fit(*_true_steps(slots, probe, states, contacts)), len(states)
    states, contacts = dataset_scenes(dataset, "validation", num_tuning_videos, ("state", "contacts"))
    tuning_slots = source.slots(states, progress=progress)
    tuning = _factual_rows(tuning_slots, probe, states, contacts, rules)
    slots = source.slots(scenes.states, progress=progress)
    test = _factual_rows(slots, probe, scenes.states, None, rules, scenes)

    results: dict[str, Any] = {
        "protocol": {key: value for key, value in rules.items() if key != "tasks"},
        "models": {label: str(name) for label, name in zip(nets, models)},
        "dataset": str(dataset),
        "slots": {"encoder": source.name, **source.quality(slots, scenes.states)},
        "num_videos": len(scenes.states),
        "num_removals": len(removals.scene),
        "num_training_videos": num_training,
        "bootstraps": {"count": BOOTSTRAPS, "seed": 0},
        **measured_on(device),
        "factual": [],
        "rows": [],
        "against": [],
    }

    # a) videos as they are, from their beginning; each system's readout of contacts is chosen on the validation split
    chosen: dict[str, tuple[str, float]] = {}

    def factual(label, tuned: Paths, tested: Paths):
        chosen[label] = best_threshold(readout, tuned, tuning.cubes, tuning.meets, tuning.asked, tuning.start)
        kind, threshold = chosen[label]
        verdict = readout.pairs(tested, test.cubes, kind, test.start) > threshold
        counts = event_counts(verdict, test.meets, test.asked)  # [V, 3]
        video = np.arange(len(counts))
        hit, extra, missed = (bootstrap.totals(column.astype(float), video) for column in counts.T)
        with np.errstate(invalid="ignore", divide="ignore"):
            f1, precision, recall = 2 * hit / (2 * hit + extra + missed), hit / (hit + extra), hit / (hit + missed)
        n = int(counts[:, [0, 2]].sum())
        row = {"name": label, "readout": kind, "threshold": threshold, "f1": interval(f1, n)}
        results["factual"].append(row | {"precision": interval(precision), "recall": interval(recall)})

    factual("true video", tuning.truth, test.truth)
    factual("constant velocity", constant_velocity(tuning.observed), constant_velocity(test.observed))
    for label, net in nets.items():
        both = [
            imagined_paths(net, part.observed, probe, {}, batch_size=batch_size, progress=label if progress else None)
            for part in (tuning, test)
        ]
        factual(label, both[0]["none"], both[1]["none"])
    if on_row is not None:
        on_row(results)

    # b) the removals
    samples: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    seen = true_videos and not isinstance(source, StateSlots)
    truth = source.slots(removals.states, progress=progress) if seen else None
    for start in starts:
        branch = start == "B"
        step = removals.contact // 4 + 1 if branch else np.full(len(removals.gone), rules["early_history_length"])
        phase = removals.contact % 4 if branch else np.zeros_like(removals.contact)
        observed = observe(slots, probe, removals.scene, scenes.contact, step, phase, entry_steps=rules["entry_steps"])
        asked = make_pair_questions(
            scenes, removals, observed.frames[np.arange(len(step)), step - 1], observed.given.any(1)
        )
        cubes = _cubes(scenes.states)[removals.scene]

        def add(label, paths, like, left_out=None, start=start, observed=observed, asked=asked, cubes=cubes, **more):
            kind, threshold = chosen[like]
            paths = paths.without(removals.gone)
            late = readout.pairs(paths, cubes, kind, observed.start) > threshold
            whole = readout.pairs(paths, cubes, kind, None) > threshold
            errors, found = score_positions(paths, scenes, removals, observed, rules["horizons"], bootstrap, left_out)
            scores, more_found = score_pairs(asked, late, removals.scene, bootstrap)
            samples[start, label] = {**{f"position_error {h}": v for h, v in found.items()}, **more_found}
            row = {"name": label, "start": start, **more, "position_error": errors, **scores}
            results["rows"].append(row | {"questions": score_questions(removals, whole)})
            if on_row is not None:
                on_row(results)

        video, _ = video_steps(slots, removals.scene, phase)
        add("copy the video", _padded(read_paths(probe, video)), "true video")
        add("constant velocity", constant_velocity(observed), "constant velocity")
        frame = np.minimum(observed.frames, FRAMES - 1)
        rows = np.arange(len(frame))[:, None]
        true = Paths(
            removals.positions[rows, frame], removals.in_view[rows, frame] & (observed.frames < FRAMES)[..., None]
        )
        add("true positions", true, "true video")
        if truth is not None:
            steps, _ = video_steps(truth, np.arange(len(rows)), phase)
            add("true counterfactual video", _padded(read_paths(probe, steps)), "true video")
        wrong = np.where(removals.wrong < 0, removals.gone, removals.wrong)
        for label, net in nets.items():
            edits = {name: [(OPERATORS[name], removals.gone)] for name in operators}
            edits["wrong object"] = [(Empty, wrong)]
            found = imagined_paths(
                net, observed, probe, edits, batch_size=batch_size, progress=f"{label}, {start}" if progress else None
            )
            for name in operators:
                add(_with(label, name, operators), found[name], label, model=label, operator=name)
            add(f"{label}, no removal", found["none"], label, model=label, operator="none")
            other = found["wrong object"].without(removals.wrong)
            more = {"model": label, "operator": "wrong object"}
            add(f"{label}, wrong object", other, label, removals.wrong, **more)
            if occluded and branch:
                _add_occluded(results, net, label, observed, probe, scenes, removals, bootstrap, batch_size)
        own = [_with(label, operators[0], operators) for label in nets]
        for label in own:
            controls = ["constant velocity", "copy the video"] + ([own[0]] if label != own[0] else [])
            results["against"] += _differences(samples, start, label, controls)
    if text_only is not None:
        results["rows"].append(_text_only_row(text_only, rules, num_tasks, scenes, removals, device))
    if on_row is not None:
        on_row(results)
    return results


def _label(name: str, taken: Mapping[str, Any]) -> str:
    """The folder's name; with its parent where that is taken."""
    parts = str(name).rstrip("/").split("/")
    for count in range(1, len(parts) + 1):
        label = "/".join(parts[-count:])
        if label not in taken:
            return label
    raise ValueError(f"{name} is named twice")


def _with(label, operator, operators):
    return label if len(operators) == 1 else f"{label}, {operator}"


def _slot_source(slot_encoder, first_model, nets, dataset, device):
    """True states, or what an encoder sees."""
    if slot_encoder is None and nets[0].slot_encoder is None:
        metadata = load_slot_dataset(dataset, "validation", check_values=False).metadata
        encoder = metadata.get("encoder") or {}
        if encoder.get("name") != STATE_ENCODER:
            raise ValueError(f"{dataset} was made by {encoder.get('name')!r}: give --slot-encoder, or state slots")
        source = StateSlots(metadata["slot_size"], bool(encoder.get("velocities")))
    else:
        source = PixelSlots(slot_encoder or first_model, device=device)
    for net in nets:
        if net.config.slot_size != source.slot_size:
            raise ValueError(f"a model takes slots of size {net.config.slot_size}, these have {source.slot_size}")
    return source


def _cubes(states: np.ndarray) -> np.ndarray:
    """bool [V, 6]"""
    rows = states[:, 0].reshape(len(states), MAX_OBJECTS, -1)
    return (rows[..., 0] > 0.5) & (rows[..., 7].astype(int) == SHAPES.index("cube"))


def _padded(paths: Paths) -> Paths:
    """Paths of a video's 32 steps, with nothing in the two after it."""
    more = STEPS - paths.present.shape[1]
    return Paths(
        np.pad(paths.positions, ((0, 0), (0, more), (0, 0), (0, 0))),
        np.pad(paths.present, ((0, 0), (0, more), (0, 0))),
    )


def _meetings(contacts: np.ndarray) -> np.ndarray:
    """Frames int [V, 15] of contacts bool [V, 128, 15]."""
    return np.where(contacts.any(1), contacts.argmax(1), NEVER)


def _true_steps(slots, probe, states, contacts):
    count = len(states)
    steps, _ = video_steps(slots, np.arange(count), np.zeros(count, int))
    meetings = _meetings(contacts)
    return _padded(read_paths(probe, steps)), _cubes(states), np.where(meetings < NEVER, meetings // 4, NEVER)


@dataclass
class _Factual:
    observed: Observed
    truth: Paths
    cubes: np.ndarray
    meets: np.ndarray
    asked: np.ndarray
    start: np.ndarray


def _factual_rows(slots, probe, states, contacts, rules, scenes=None) -> _Factual:
    """Videos imagined as they are from their first three steps; pairs that meet before are not asked about."""
    count = len(states)
    meetings = _meetings(contacts) if scenes is None else scenes.meetings
    contact = np.stack([meetings[:, (k == _PAIR).any(1)].min(1) for k in range(MAX_OBJECTS)], axis=1)
    start, phase = np.full(count, rules["early_history_length"]), np.zeros(count, int)
    observed = observe(slots, probe, np.arange(count), contact, start, phase, entry_steps=rules["entry_steps"])
    steps, frames = video_steps(slots, np.arange(count), phase)
    first = frames[np.arange(count), start - 1][:, None]
    there = observed.given.any(1)[:, _PAIR].all(-1)
    return _Factual(
        observed,
        _padded(read_paths(probe, steps)),
        _cubes(states),
        (meetings >= first) & (meetings < VIDEO_FRAMES),
        there & (meetings >= first),
        start,
    )


def _differences(samples, start, label, controls) -> list[dict[str, Any]]:
    """A model minus each control, on the same resampled videos; of errors their quotient."""
    rows = []
    for control in controls:
        mine, other = samples[start, label], samples[start, control]
        row: dict[str, Any] = {"name": label, "start": start, "control": control}
        for key in mine:
            if key.startswith("position_error"):
                with np.errstate(invalid="ignore", divide="ignore"):
                    row[f"{key}, quotient"] = interval(mine[key] / other[key])
            else:
                row[key] = interval(mine[key] - other[key])
        rows.append(row)
    return rows


def _add_occluded(results, net, label, observed, probe, scenes, removals, bootstrap, batch_size) -> None:
    """Errors of an object whose history is hidden after its first two steps, while another one is removed."""
    longest = min(net.config.history_length, 6)
    first = np.maximum(observed.start - longest, 0)
    step = np.arange(STEPS)[None, :]
    history = (step >= first[:, None]) & (step < observed.start[:, None])
    whole = (observed.given | ~history[..., None]).all(1)
    whole[np.arange(len(first)), removals.gone] = False
    rows = np.flatnonzero(whole.any(1) & (observed.start - first > 2))
    target = whole[rows].argmax(1)
    part = Removals(
        *(getattr(removals, name)[rows] for name in Removals.__annotations__ if name != "questions"), questions=[]
    )
    hidden = history[rows] & (step >= first[rows, None] + 2)

    def seen(slots, given):
        paths = Paths(observed.paths.positions[rows], given)
        return Observed(slots, observed.start[rows], observed.frames[rows], paths, given)

    given = observed.given[rows].copy()
    places = np.nonzero(hidden)
    given[places[0], places[1], target[places[0]]] = False
    slots = observed.slots[torch.from_numpy(rows)].clone()
    object_ = torch.from_numpy(target)
    masked = seen(slots, observed.given[rows])
    edits = {"hidden": [(Empty, part.gone), (Mask, target)], "seen": [(Empty, part.gone)]}
    found = imagined_paths(net, masked, probe, edits, batch_size=batch_size)
    # what a model without masks would be given: the object goes on as it was last seen
    filled = slots.clone()
    row, at = (torch.from_numpy(x) for x in places)
    base = torch.from_numpy(first[rows])[row] + 1
    last, before = (slots[row, base - k, object_[row]] for k in (0, 1))
    filled[row, at, object_[row]] = last + (at - base)[:, None] * (last - before)
    found["filled in"] = imagined_paths(
        net, seen(filled, observed.given[rows]), probe, {"filled in": [(Empty, part.gone)]}, batch_size=batch_size
    )["filled in"]
    blind = seen(slots, given)
    systems = {
        f"{label}, hidden": found["hidden"],
        f"{label}, filled in at constant velocity": found["filled in"],
        f"{label}, seen": found["seen"],
        "constant velocity, hidden": constant_velocity(blind),
    }
    index = np.arange(len(rows))
    for name, paths in systems.items():
        if any(row["name"] == name for row in results.setdefault("occluded", [])):
            continue
        held, errors = paths.held(), {}
        for horizon in (4, 16, 32, 48, 64):
            at = observed.start[rows] - 1 + horizon // 4
            ok = at < VIDEO_STEPS
            at = np.minimum(at, STEPS - 1)
            frame = np.minimum(observed.frames[rows][index, at], FRAMES - 1)
            ok &= part.in_view[index, frame, target] & (frame < VIDEO_FRAMES)
            error = np.linalg.norm(held[index, at, target] - part.positions[index, frame, target], axis=-1)
            errors[str(horizon)] = interval(bootstrap.mean(error[ok].astype(np.float64), part.scene[ok]), ok.sum())
        results["occluded"].append({"name": name, "position_error": errors})


@torch.no_grad()
def _text_only_row(name, rules, num_tasks, scenes, removals, device) -> dict[str, Any]:
    """An ALOE on the words of the questions alone; pairs that no question asks about have no verdict."""
    from ..models.aloe import AloeForVideoQuestionAnswering, AloeProcessor

    model = AloeForVideoQuestionAnswering.from_pretrained(name, use_safetensors=True).eval().to(device)
    processor = AloeProcessor.from_pretrained(name)
    low, high = rules["first_contact"]
    texts, marks = [], []
    for number, task in enumerate(rules["tasks"][:num_tasks]):
        for question in task["questions"]:
            if low <= scenes.contact[number, question["removed"]] <= high:
                texts.append((question["question"], question["options"]))
                pairs = [OBJECT_PAIRS.index(tuple(pair)) for pair in question["pairs"]]
                marks.append((number, question["removed"], pairs, [a == "correct" for a in question["answers"]]))
    blank = torch.zeros(processor.observed_frames, model.config.num_slots, model.config.slot_size)
    right = []
    for first in range(0, len(texts), 64):
        part = texts[first : first + 64]
        inputs = processor(
            blank, [text for text, _ in part], [options for _, options in part], ["counterfactual"] * len(part)
        )
        logits = model(**{key: value.to(device) for key, value in inputs.items()}).option_logits.cpu().numpy()
        ends = np.cumsum([len(options) for _, options in part])
        right += [
            (given > 0) == np.array(mark[3])
            for given, mark in zip(np.split(logits.reshape(-1), ends[:-1]), marks[first : first + 64])
        ]
    changed = []
    for (number, gone, pairs, _), one in zip(marks, right):
        (row,) = np.flatnonzero((removals.scene == number) & (removals.gone == gone))
        differs = (removals.meetings[row, pairs] < VIDEO_FRAMES) != (scenes.meetings[number, pairs] < VIDEO_FRAMES)
        changed += one[differs].tolist()
    questions = {
        "questions": success_rate([one.all() for one in right]),
        "options": success_rate(np.concatenate(right)),
    }
    row = {"name": "text only", "start": None, "model": str(name), "questions": questions}
    return row | {"informative": success_rate(changed) if changed else None}


# ------------------------------------------------------------------------------------------------------------- table


def print_cf_rollout(results: Mapping[str, Any]) -> None:
    """The results of [`evaluate_cf_rollout`] as tables."""

    def number(value, digits=3):
        if value is None or value.get("value", value.get("rate")) is None:
            return f"{'-':>20}"
        center = value.get("value", value.get("rate"))
        return f"{center:>6.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"

    rules = results["protocol"]
    print(f"{rules['name']}: {rules['description']}")
    print(f"{results['num_videos']} videos, {results['num_removals']} removals, slots: {results['slots']}")
    print("\npair events of videos imagined as they are, from frame 8 to the end")
    for row in results["factual"]:
        cells = "  ".join(f"{key} {number(row[key])}" for key in ("f1", "precision", "recall"))
        print(f"  {row['name']:<34}{cells}  n {row['f1']['n']}")
    for start, what in rules["starts"].items():
        rows = [row for row in results["rows"] if row["start"] == start]
        if not rows:
            continue
        print(f"\nstart {start} ({what})")
        horizons = rules["horizons"]
        print(f"  {'':<34}" + "".join(f"{f'error +{h}':<22}" for h in horizons))
        for row in rows:
            print(f"  {row['name']:<34}" + "".join(f"{number(row['position_error'][str(h)]):<22}" for h in horizons))
        counts = ", ".join(str(rows[0]["position_error"][str(h)]["n"]) for h in horizons)
        print(f"  {'n':<34}{counts}")
        titles = ["four cells", "third object", "informative", "questions"]
        print(f"  {'':<34}" + "".join(f"{title:<22}" for title in titles))
        for row in rows:
            asked = row["questions"] and row["questions"]["questions"]
            cells = [row["cell_mean"], row["third_object"], row["informative"], asked]
            print(f"  {row['name']:<34}" + "".join(f"{number(cell):<22}" for cell in cells))
    for row in results["rows"]:
        if row["start"] is None:
            print(f"\n{row['name']}: questions {number(row['questions']['questions'])}, options "
                  f"{number(row['questions']['options'])}, informative {number(row['informative'])}")  # fmt: skip
    for row in results.get("occluded", ()):
        errors = "  ".join(f"+{h} {number(value)}" for h, value in row["position_error"].items())
        print(f"hidden history: {row['name']:<44}{errors}")


__all__ = ["evaluate_cf_rollout", "print_cf_rollout", "simulate_protocol"]
