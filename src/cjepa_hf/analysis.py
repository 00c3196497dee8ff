"""
Influence: which other entities does a prediction use, and are these the ones that matter? `cjepa-hf analyze`.

The paper calls the smallest set of other entities that suffices to recover a hidden object its influence neighborhood,
expects attention to align with it (Corollary 1), and leaves the test open. Simulators know who touched whom, and what
would have happened without an object. Both are truths here, for what attention, gradients and leaving entities out say.
Distances alone find most partners: they stand beside every measure, and pairs that come as near without touching or
without consequence are scored on their own.

Axes: B windows, T observed frames, P predicted frames, N slots, M tokens per frame, I targets (the entities whose
prediction is explained), E entities (targets first), R rows (a window and a target), F simulator frames of a window.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel

from .data.slots import SlotDataset, SlotWindows, frame_columns, load_slot_dataset, normalize_windows
from .data.state_slots import OBJECT_PAIRS
from .data.video import push_t_segments
from .evaluation.counterfactual import VideoBootstrap, interval
from .evaluation.metrics import auroc, average_precision
from .evaluation.protocols import measured_on
from .models.cjepa import CJepaModel
from .models.cjepa.modeling_cjepa import solve_assignment
from .simulators.collisions import FPS as COLLISION_FPS
from .simulators.collisions import CollisionObject, CollisionWorld
from .simulators.push_t import PushTWorld, block_distance
from .simulators.rendering import (
    AGENT_RADIUS,
    COLORS,
    GOAL_POSE,
    MATERIALS,
    MAX_OBJECTS,
    OBJECT_STATE_NAMES,
    SHAPES,
    TABLE_SIZE,
    VIEW_SIZE,
    block_vertices,
    render_collisions,
    render_push_t,
)

__all__ = [
    "InfluenceWindows",
    "analyze",
    "draw_example",
    "influence",
    "plot_influence",
    "print_analysis",
    "windows_of",
]

SETTINGS = ("masked", "future")
TRUTHS = ("touches", "changes")
_ATTENTION_BYTES = 64 * 2**20  # of all layers' maps of one chunk; what the gradient needs takes some 20 times that
_PRECISION_RESAMPLES = 200  # of the average precision, which takes longer than the others
_FAR = -2000.0  # px: out of everybody's reach
_PUSH_T_STEP = 0.1  # s per frame


# --------------------------------------------------------------------------------------------------------- measures


def influence(
    model: CJepaModel,
    slots: torch.Tensor,
    *,
    actions: torch.Tensor | None = None,
    proprio: torch.Tensor | None = None,
    setting: str = "masked",
    entities: Sequence[Sequence[int]] | None = None,
    batch_size: int | None = None,
    progress: str | None = None,
) -> dict[str, torch.Tensor]:
    """
    How much the prediction of every target uses every other entity; higher = more. Nothing is trained or changed.

    Measures:
        attention_1, attention_2, ...: attention of the target's predicted tokens to all tokens of the entity, summed over
            frames, mean over heads and predicted tokens, in each layer.
        attention_rollout: the same, followed through all layers (with the residual path counting half).
        gradient_x_input: |gradient x token|, summed over the entity's visible tokens, of how far the prediction moves from
            the target's last visible state.
        leave_one_out: root mean square change of the prediction when the entity is taken out of the set.

    Args:
        slots: [B, T, N, D]; actions [B, T, A] and proprio [B, T, P] in normalized units.
        setting: "masked": the target's slot is hidden after the model's `visible_prefix`, and its hidden frames are
            predicted; "future": nothing is hidden, and the target's future frames are.
        entities: tokens of each entity: 0 ... N - 1 are slots, N the first auxiliary token (proprioception, where there is
            one, before the action). Those that begin with a slot are targets and come first. Default: each token alone.
        batch_size: rows per pass; default: as many as 64 MiB of attention maps take.

    Returns:
        Measures, float32 [B, I, E] each on the CPU; NaN where an entity would explain itself.

    Raises `ValueError` for other models than [`CJepaModel`], unknown settings, histories without a hidden frame, and
    entities that overlap or have unknown tokens.
    """
    if not isinstance(model, CJepaModel):
        raise ValueError(f"influence explains a CJepaModel, not a {type(model).__name__}")
    if setting not in SETTINGS:
        raise ValueError(f"setting={setting!r}: expected one of {SETTINGS}")
    config = model.config
    count, steps, num_slots, _ = slots.shape
    width = num_slots + config.num_auxiliary_tokens
    groups = [[token] for token in range(width)] if entities is None else [list(group) for group in entities]
    used = [token for group in groups for token in group]
    targets = [group[0] for group in groups if group and group[0] < num_slots]
    if len(set(used)) < len(used) or not all(0 <= token < width for token in used) or not all(groups):
        raise ValueError(f"entities={groups}: expected different tokens from 0 to {width - 1}, at least one for each")
    if targets != [group[0] for group in groups[: len(targets)]]:
        raise ValueError(f"entities={groups}: those that begin with a slot (below {num_slots}) come first")
    prefix = config.visible_prefix
    if setting == "masked" and steps <= prefix:
        raise ValueError(f"slots have {steps} frames, {prefix} of them always visible: nothing can be hidden")
    frames = range(prefix, steps) if setting == "masked" else range(steps, steps + config.prediction_length)
    length = (steps + config.prediction_length) * width
    if batch_size is None:
        row = 4 * config.num_hidden_layers * config.num_attention_heads * length**2
        batch_size = max(_ATTENTION_BYTES // row, len(targets))
    size = max(batch_size // len(targets), 1)
    parts = []
    with _explainable(model) as maps:
        for first in tqdm(range(0, count, size), desc=progress, disable=progress is None, leave=False):
            pick = slice(first, first + size)
            chosen = [None if x is None else x[pick].to(model.device) for x in (slots, actions, proprio)]
            parts.append(_influence_of(model, maps, *chosen, setting, groups, targets, frames))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@contextmanager
def _explainable(model: CJepaModel):
    """The model in eval mode, with eager attention whose maps land in the list that is given out; then as it was."""
    # of the predictor alone: `set_attn_implementation` would also ask the slot encoder, which may know only one
    training, implementation = model.training, model.config._attn_implementation_internal
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    maps: list[torch.Tensor] = []
    hooks = []
    try:
        model.eval().requires_grad_(False)
        model.config._attn_implementation_internal = "eager"
        for layer in model.predictor.layers:
            hooks.append(layer.attention.register_forward_hook(lambda module, inputs, output: maps.append(output[1])))
        yield maps
    finally:
        for hook in hooks:
            hook.remove()
        model.config._attn_implementation_internal = implementation
        for parameter, was in zip(model.parameters(), wanted):
            parameter.requires_grad_(was)
        model.train(training)


def _influence_of(model, maps, slots, actions, proprio, setting, groups, targets, frames) -> dict[str, torch.Tensor]:
    config = model.config
    # the inputs are checked as for a prediction, then every target gets a row of its own
    slots = model._check_slots(slots, config.history_length)
    model._check_auxiliaries(actions, proprio, slots.shape[0], slots.shape[1])
    tokens = model._tokens(slots, actions, proprio).detach()  # [B, T, M, hidden]
    count, steps, width, _ = tokens.shape
    rows = count * len(targets)
    target = torch.tensor(targets, device=tokens.device).repeat(count)  # [R]
    tokens = tokens.repeat_interleave(len(targets), dim=0)
    hidden = torch.zeros(rows, steps, width, dtype=torch.bool, device=tokens.device)
    anchor = steps - 1
    if setting == "masked":
        anchor = config.visible_prefix - 1
        hidden[torch.arange(rows), anchor + 1 :, target] = True
    index = torch.arange(rows, device=tokens.device)
    query = torch.tensor(list(frames), device=tokens.device)

    def predicted(tokens, hidden, place):
        output = model.predictor(tokens, hidden)[..., : config.slot_size]
        return output[index[:, None], query, place[:, None]]  # [R, Q, D]

    def of_entities(values):  # [R, M] of tokens -> [R, E]
        return torch.stack([values[:, group].sum(-1) for group in groups], dim=-1)

    maps.clear()
    with torch.enable_grad():
        inputs = tokens.clone().requires_grad_(True)
        prediction = predicted(inputs, hidden, target)
        moved = prediction - tokens[index, anchor, target][:, None, : config.slot_size]
        (gradient,) = torch.autograd.grad(moved.square().sum(-1).clamp(min=1e-12).sqrt().sum(), inputs)
    result = {}
    queries = query * width + target[:, None]  # [R, Q], places in the flattened sequence
    flow = torch.zeros(rows, len(query), maps[0].shape[-1], device=tokens.device)
    flow.scatter_(2, queries[..., None], 1.0)
    for number, layer in reversed(list(enumerate(maps, start=1))):
        heads = layer.detach().float().mean(1)  # [R, L, L]
        flow = 0.5 * flow + 0.5 * flow @ heads
        own = heads.gather(1, queries[..., None].expand(-1, -1, heads.shape[-1]))
        result[f"attention_{number}"] = of_entities(own.mean(1).unflatten(-1, (-1, width)).sum(1))
    result = dict(reversed(result.items()))
    result["attention_rollout"] = of_entities(flow.mean(1).unflatten(-1, (-1, width)).sum(1))
    maps.clear()
    attribution = (gradient * tokens).sum(-1).abs().masked_fill(hidden, 0.0)  # [R, T, M]
    result["gradient_x_input"] = of_entities(attribution.sum(1))

    changes = []
    for group in groups:
        keep = [token for token in range(width) if token not in group]
        place = torch.full((width,), -1, device=tokens.device)
        place[keep] = torch.arange(len(keep), device=tokens.device)
        there = place[target] >= 0
        with torch.no_grad():
            without = predicted(tokens[:, :, keep], hidden[:, :, keep], place[target].clamp(min=0))
        change = (without - prediction.detach()).square().mean((1, 2)).sqrt()
        changes.append(torch.where(there, change, torch.nan))
        maps.clear()
    result["leave_one_out"] = torch.stack(changes, dim=-1)
    own = torch.isnan(result["leave_one_out"])
    return {
        name: values.masked_fill(own, torch.nan).unflatten(0, (count, -1)).float().cpu()
        for name, values in result.items()
    }


# ---------------------------------------------------------------------------------------------------------- windows


@dataclass
class Truth:
    """
    What is true between the last frame in which a target is visible and the last one that is predicted.

    touches, changes: float [B, I, E]: 1 if the entity touches the target, or if the target's path would be another one
    without it; 0 if not; NaN where that cannot be said. closest [B, I, E]: how near they come, edge to edge on Push-T,
    center to center in the collision world. baselines: scores [B, I, E] of distances, higher = nearer.
    """

    touches: np.ndarray
    changes: np.ndarray
    closest: np.ndarray
    baselines: dict[str, np.ndarray]


@dataclass
class InfluenceWindows:
    """
    Windows with what is known of them. slots [B, T, N, D], actions and proprio normalized, or None. names of the E
    entities, and their tokens. episode int [B], and num_episodes that there are. truths: one per setting. frames(b) draws
    the last observed frame of window b, uint8 [H, W, 3]; places [B, E, 2]: where the entities are in it, as shares of its
    width and height, NaN where unknown. roles: entity k is the same thing in all windows, so that distractors are matched
    with pairs of the same two; caliper: how much nearer or further than its match a distractor may come.
    """

    slots: torch.Tensor
    actions: torch.Tensor | None
    proprio: torch.Tensor | None
    names: list[str]
    entities: list[list[int]]
    episode: np.ndarray
    num_episodes: int
    truths: dict[str, Truth]
    frames: Callable[[int], np.ndarray]
    places: np.ndarray
    roles: bool
    caliper: float


def windows_of(
    model: CJepaModel,
    dataset: SlotDataset,
    *,
    image_processor: Any = None,
    num_windows: int = 512,
    seed: int = 0,
    simulated: dict | None = None,
    progress: str | None = None,
) -> InfluenceWindows:
    """
    Windows drawn at random from a slot dataset of Push-T (slots of the model's own encoder) or of the collision world
    (state slots), as long as the model's history and prediction, with their truths.

    Push-T's entities are agent (its slot, and the proprioception and action tokens, which tell as much), block, goal and
    background. The agent follows its actions whatever it touches, so that only the block is asked who touched it; what
    would happen without an entity is simulated. In the collision world everything is simulated again from the state at the
    target's last visible frame, with and without each object. A path is another one if it ends more than 2 px (mean over
    the T's corners) or 0.05 units away; smaller changes are not scored.

    Args:
        image_processor: of the model's slot encoder; Push-T needs both, to know which slot is which.
        simulated: keeps what was simulated, for the next model with the same lengths.

    Raises `ValueError` for datasets without state, contacts, or a known simulator.
    """
    for column in ("state", "contacts"):
        if column not in dataset.columns:
            raise ValueError(f"{dataset.name} has no column {column!r}: extract slots from simulated episodes")
    config = model.config
    if dataset.num_slots != config.num_slots or dataset.slot_size != config.slot_size:
        raise ValueError(
            f"{dataset.name} has slots [{dataset.num_slots}, {dataset.slot_size}], the model takes "
            f"[{config.num_slots}, {config.slot_size}]: give the slots it was trained on"
        )
    if num_windows < 1:
        raise ValueError(f"num_windows={num_windows} must be at least 1")
    history, skip = config.history_length, config.frame_skip
    windows = SlotWindows(dataset, history, config.prediction_length, skip)
    chosen = np.random.default_rng(seed).permutation(len(windows))[:num_windows]
    batch = windows.get_batch(np.sort(chosen))
    episode, start = windows.locate(np.sort(chosen))
    span = (history + config.prediction_length) * skip
    raw = {
        name: column.gather(episode, start[:, None] + np.arange(span))
        for name, column in frame_columns(dataset.data, ["state", "contacts"]).items()
    }
    states, contacts = raw["state"].astype(np.float64), raw["contacts"] > 0.5
    statistics = {}
    for key in ("action", "proprio"):
        if getattr(config, f"{key}_size"):
            mean, std = model._statistics(key)
            statistics |= {f"{key}_mean": mean.cpu(), f"{key}_std": std.cpu()}
    names = [name for name, size in (("actions", config.action_size), ("proprio", config.proprio_size)) if size]
    missing = [name for name in names if name not in batch]
    if missing:
        raise ValueError(f"{dataset.name} has no {' and no '.join(missing)}, which the model takes")
    inputs = normalize_windows({name: batch[name] for name in names}, statistics)
    inputs = {name: value[:, :history] for name, value in inputs.items()}
    timing = _Timing(history, config.prediction_length, skip, config.visible_prefix)
    entities = [[k] for k in range(dataset.num_slots)]
    if states.shape[-1] == 7:
        source = dataset.metadata.get("source") or {}
        goal = np.asarray((source.get("render") or {}).get("goal_pose") or GOAL_POSE)
        if "actions" not in batch:
            raise ValueError(f"{dataset.name} has no actions: they are needed to simulate what would happen")
        order = _push_t_slots(model, image_processor, states[:16, 0], goal)
        entities = [[slot] for slot in order]
        entities[0] += range(config.num_slots, config.num_slots + config.num_auxiliary_tokens)
        actions = batch["actions"].numpy().reshape(len(states), span, -1)
        simulate = partial(_push_t_scene, states, contacts, actions, goal)
    elif states.shape[-1] == MAX_OBJECTS * len(OBJECT_STATE_NAMES) and dataset.num_slots == MAX_OBJECTS:
        simulate = partial(_collision_scene, states, contacts)
    else:
        raise ValueError(
            f"{dataset.name} has states of {states.shape[-1]} numbers and {dataset.num_slots} slots: expected Push-T "
            f"(7), or state slots of the collision world ({MAX_OBJECTS * len(OBJECT_STATE_NAMES)}, {MAX_OBJECTS} slots)"
        )
    simulated = {} if simulated is None else simulated
    key = (timing, num_windows, seed)
    if key not in simulated:
        simulated[key] = simulate(timing, progress)
    return InfluenceWindows(
        slots=batch["slots"][:, :history],
        actions=inputs.get("actions"),
        proprio=inputs.get("proprio"),
        episode=episode,
        num_episodes=len(dataset),
        entities=entities,
        **simulated[key],
    )


@dataclass(frozen=True)
class _Timing:
    """Frames of a window: `observed`, and for each setting from the last visible to the last predicted one."""

    history: int
    prediction: int
    skip: int
    prefix: int

    @property
    def observed(self) -> np.ndarray:
        return np.arange(self.history) * self.skip

    def span(self, setting: str) -> tuple[int, int]:
        if setting == "masked":
            return (self.prefix - 1) * self.skip, (self.history - 1) * self.skip
        return (self.history - 1) * self.skip, (self.history + self.prediction - 1) * self.skip


def _distances(poses, velocity, distance, timing: _Timing, setting: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """
    Closest [B, E, E] and scores of the distance baselines, target before source.

    Args:
        poses: [B, F, E, C] of all frames; velocity: [B, E, C] per frame, at the last visible frame.
        distance: of poses [B, K, E, C] of targets and of sources -> [B, K, E, E].
    """
    first, last = timing.span(setting)
    seen = timing.observed
    here = poses[:, first : first + 1]
    if setting == "masked":  # the target was seen last at the anchor, the others to the end of the history
        seen = seen[seen >= first]
        track_target, track_source = np.repeat(here, len(seen), axis=1), poses[:, seen]
        ahead = (seen - first)[None, :, None, None]
        future_target, future_source = here + velocity[:, None] * ahead, poses[:, seen]
    else:
        track_target = track_source = poses[:, seen]
        ahead = np.arange(last - first + 1)[None, :, None, None]
        future_target = future_source = here + velocity[:, None] * ahead
    during = poses[:, first : last + 1]
    baselines = {
        "distance": -distance(here, here).min(1),
        "closest_seen": -distance(track_target, track_source).min(1),
        "constant_velocity": -distance(future_target, future_source).min(1),
    }
    return distance(during, during).min(1), baselines


def _push_t_slots(model, image_processor, states, goal) -> list[int]:
    """The slots of agent, block, goal and background: by the overlap of the encoder's masks with the true ones."""
    if model.slot_encoder is None or image_processor is None:
        raise ValueError(
            "Push-T: the model holds no slot encoder, whose masks tell which slot is the agent and which the block: "
            "train with --slot_encoder"
        )
    render = partial(render_push_t, resolution=model.slot_encoder.config.image_size, goal_pose=goal)
    true = push_t_segments(states, render)
    pixels = image_processor(list(render(states)), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        masks = model.slot_encoder(pixels[:, None].to(model.device)).masks[:, 0].float().cpu()
    masks = torch.nn.functional.interpolate(masks, true.shape[1:], mode="bilinear", align_corners=False)
    things = torch.from_numpy(np.stack([true == label for label in (1, 3, 2, 0)], axis=1)).float()
    both = torch.einsum("bthw,bnhw->tn", things, masks)
    either = things.sum((0, 2, 3))[:, None] + masks.sum((0, 2, 3)) - both
    if masks.shape[1] != 4:
        raise ValueError(f"Push-T: an encoder of {masks.shape[1]} slots; expected 4 (agent, block, goal, background)")
    return solve_assignment(-(both / either)[None])[0].tolist()


def _push_t_scene(states, contacts, actions, goal, timing, progress) -> dict[str, Any]:
    count, span, _ = states.shape
    size = 4
    poses = np.full((count, span, size, 3), np.nan)  # agent, block, goal, background
    poses[:, :, 0, :2], poses[:, :, 0, 2] = states[..., :2], 0.0
    poses[:, :, 1], poses[:, :, 2] = states[..., 2:5], goal

    truths = {}
    for setting in SETTINGS:
        first, last = timing.span(setting)
        velocity = np.zeros((count, size, 3))
        velocity[:, 0, :2] = states[:, first, 5:7] * _PUSH_T_STEP
        if setting == "future" and timing.history > 1:
            velocity[:, 1] = (states[:, first, 2:5] - states[:, first - timing.skip, 2:5]) / timing.skip
            turn = velocity[:, 1, 2] * timing.skip
            velocity[:, 1, 2] = ((turn + np.pi) % (2 * np.pi) - np.pi) / timing.skip
        closest, baselines = _distances(poses, velocity, _push_t_distance, timing, setting)
        touches = np.full((count, size, size), np.nan)
        touches[:, 1] = [0, np.nan, 0, 0]
        touches[:, 1, 0] = contacts[:, first:last, 0].any(1)
        changes = np.full((count, size, size), np.nan)
        changes[:, 0], changes[:, 1] = (
            [np.nan, 0, 0, 0],
            [0, np.nan, 0, 0],
        )  # what is painted on the table moves nothing
        for b in tqdm(range(count), desc=progress, disable=progress is None, leave=False):
            without_agent, without_block = push_t_interventions(states[b, first], actions[b, first:last])
            moved = block_vertices(np.stack([states[b, last, 2:5], without_agent[2:5]])).reshape(2, 8, 2)
            changes[b, 1, 0] = _verdict(np.linalg.norm(moved[0] - moved[1], axis=-1).mean(), 0.2, 2.0)
            changes[b, 0, 1] = _verdict(np.linalg.norm(states[b, last, :2] - without_block[:2]), 0.2, 2.0)
        truths[setting] = Truth(touches, changes, closest, baselines)

    shown = poses[:, timing.observed[-1]]
    places = shown[..., :2] / TABLE_SIZE
    for body in (1, 2):  # the middle of the T, not the origin of its coordinates
        places[:, body] = block_vertices(shown[:, body]).reshape(count, 8, 2).mean(1) / TABLE_SIZE
    return {
        "names": ["agent", "block", "goal", "background"],
        "truths": truths,
        "places": places,
        "roles": True,
        "caliper": 5.0,  # px
        "frames": lambda b: render_push_t(states[b, timing.observed[-1]][None], resolution=384, goal_pose=goal)[0],
    }


def push_t_interventions(state: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where Push-T ends after `actions` [K, 2] from `state` [7] without the agent, and without the block: [7] each."""
    ends = []
    for place in (slice(0, 2), slice(2, 4)):
        start = state.copy()
        start[place] = _FAR
        world = PushTWorld(start)
        for action in actions:
            world.step(action)
        ends.append(world.state)
    return ends[0], ends[1]


def _push_t_distance(targets: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Edge to edge in px, [B, K, 4, 4] of poses [B, K, 4, 3]; 0 where they overlap, NaN for the background."""
    shape = targets.shape[:2]
    result = np.full((*shape, 4, 4), np.nan)

    def agent_to(point, body):
        states = np.concatenate([point[..., :2], body], axis=-1).reshape(-1, 5)
        return np.maximum(block_distance(states) - AGENT_RADIUS, 0.0).reshape(shape)

    def outline_to(body, other):
        outline = _outline(body.reshape(-1, 3))  # [n, points, 2]
        states = np.concatenate([outline, np.repeat(other.reshape(-1, 1, 3), outline.shape[1], axis=1)], axis=-1)
        return block_distance(states.reshape(-1, 5)).reshape(*shape, -1).min(-1)

    for body in (1, 2):
        result[:, :, 0, body] = agent_to(targets[:, :, 0], sources[:, :, body])
        result[:, :, body, 0] = agent_to(sources[:, :, 0], targets[:, :, body])
    result[:, :, 1, 2] = outline_to(targets[:, :, 1], sources[:, :, 2])
    result[:, :, 2, 1] = outline_to(targets[:, :, 2], sources[:, :, 1])
    return result


def _outline(poses: np.ndarray) -> np.ndarray:
    """Points every few px along the edges of bar and stem, [n, points, 2] of poses [n, 3]."""
    corners = block_vertices(poses)  # [n, 2, 4, 2]
    share = np.linspace(0, 1, 13)[:, None]
    edges = corners[:, :, :, None] * (1 - share) + np.roll(corners, -1, axis=2)[:, :, :, None] * share
    return edges.reshape(len(poses), -1, 2)


def _verdict(change: float, same: float, different: float) -> float:
    """1 if a path is another one, 0 if it is the same, NaN if the change is too small to be asked for."""
    return 1.0 if change > different else 0.0 if change < same else np.nan


def _collision_scene(states, contacts, timing, progress) -> dict[str, Any]:
    count, span, _ = states.shape
    size = MAX_OBJECTS
    objects = states.reshape(count, span, size, -1)
    positions = objects[..., 1:3]
    there = (objects[..., 0] > 0.5) & (np.abs(positions) < np.array(VIEW_SIZE) / 2).all(-1)  # [B, F, 6]

    def distance(targets, sources):
        return np.linalg.norm(targets[:, :, :, None] - sources[:, :, None], axis=-1)

    seen = there[:, timing.observed].all(1)  # [B, 6]
    truths = {}
    for setting in SETTINGS:
        first, last = timing.span(setting)
        closest, baselines = _distances(
            positions, objects[:, first, :, 4:6] / COLLISION_FPS, distance, timing, setting
        )
        touches = np.zeros((count, size, size))
        for pair, (i, j) in enumerate(OBJECT_PAIRS):
            touches[:, i, j] = touches[:, j, i] = contacts[:, first:last, pair].any(1)
        changes = np.stack(
            [collision_interventions(objects[b, first], last - first)
             for b in tqdm(range(count), desc=progress, disable=progress is None, leave=False)]
        )  # fmt: skip
        # a target must be there to be predicted, a source to be used
        asked = (seen & there[:, last])[:, :, None] & seen[:, None] & ~np.eye(size, dtype=bool)
        truths[setting] = Truth(np.where(asked, touches, np.nan), np.where(asked, changes, np.nan), closest, baselines)
    shown = timing.observed[-1]
    places = np.where(there[:, shown, :, None], positions[:, shown] / np.array(VIEW_SIZE) + 0.5, np.nan)
    return {
        "names": [f"object {k}" for k in range(size)],
        "truths": truths,
        "places": places,
        "roles": False,
        "caliper": 0.05,  # units
        "frames": lambda b: render_collisions(states[b, shown], resolution=(320, 480))[0],
    }


def collision_interventions(objects: np.ndarray, num_frames: int) -> np.ndarray:
    """
    Whether the path of object i in the next frames is another one without object j: [6, 6] of 1, 0, and NaN where
    that is not known (not there; a change of less than 0.05 units; objects that overlap in the state).

    Args:
        objects: [6, 10], a state of `OBJECT_STATE_NAMES`.
    """
    result = np.full((MAX_OBJECTS, MAX_OBJECTS), np.nan)
    ids = np.flatnonzero(objects[:, 0] > 0.5)
    if len(ids) < 2:
        return result
    start = []
    for x, y, angle, vx, vy, spin, *kind in objects[ids, 1:]:
        shape, color, material = (values[int(k)] for values, k in zip((SHAPES, COLORS, MATERIALS), kind))
        start.append(CollisionObject(shape, color, material, (x, y), (vx, vy), angle, spin))
    try:
        world = CollisionWorld(start, ids)
    except ValueError:  # in the middle of a collision they overlap a little
        return result
    path = dict(zip(ids, world.simulate(num_frames + 1).positions.swapaxes(0, 1)))
    for j in ids:
        other = world.without(int(j))
        for i, positions in zip(other.ids, other.simulate(num_frames + 1).positions.swapaxes(0, 1)):
            result[i, j] = _verdict(np.linalg.norm(positions - path[i], axis=-1).max(), 1e-6, 0.05)
    return result


# ----------------------------------------------------------------------------------------------------------- scores


def matched_pairs(closest: np.ndarray, labels: np.ndarray, stratum: np.ndarray, caliper: float) -> np.ndarray:
    """
    Positives with a negative each of the same stratum that came as near, none used twice: bool [n], of both.

    Args:
        closest: float [n]; labels: bool [n]; stratum: int [n]; caliper: largest difference.
    """
    chosen, free = np.zeros(len(labels), bool), ~labels
    # the furthest positives first: they find many negatives, so that the near ones are left for the others
    for positive in np.flatnonzero(labels)[np.argsort(-closest[labels], kind="stable")]:
        gap = np.where(free & (stratum == stratum[positive]), np.abs(closest - closest[positive]), np.inf)
        best = int(gap.argmin())
        if gap[best] <= caliper:
            free[best] = False
            chosen[[positive, best]] = True
    return chosen


def _score(values, truth, closest, windows, bootstrap) -> tuple[dict[str, Any], dict[str, dict]]:
    """Counts, and for every measure the bootstrap samples of each score."""
    known = np.isfinite(truth) & np.isfinite(closest)
    for scores in values.values():
        known &= np.isfinite(scores)
    window, target, source = np.nonzero(known)
    labels, episode = truth[known] > 0.5, windows.episode[window]
    stratum = target * len(windows.names) + source if windows.roles else np.zeros(len(labels), int)
    matched = matched_pairs(closest[known], labels, stratum, windows.caliper)
    counts = {
        "pairs": len(labels),
        "positives": int(labels.sum()),
        "windows": len(np.unique(window)),
        "episodes": len(np.unique(episode)),
        "matched_pairs": int(matched.sum()),
    }
    samples: dict[str, dict] = {}
    if not labels.any() or labels.all():
        return counts, samples
    weights = np.concatenate([np.ones((1, windows.num_episodes)), bootstrap.weights])
    for name, scores in values.items():
        s = scores[known]
        part = {"auroc": auroc(s, labels, episode, weights)}
        if matched.any():
            part["matched_auroc"] = auroc(s[matched], labels[matched], episode[matched], weights)
        part["within_auroc"] = _within(scores, truth, known, windows.episode, bootstrap)
        part["average_precision"] = average_precision(s, labels, episode, weights[: 1 + _PRECISION_RESAMPLES])
        samples[name] = part
    return counts, samples


def _within(scores, truth, known, episode, bootstrap) -> np.ndarray:
    """Mean over windows and targets of the AUROC among the target's own sources, where it has both kinds."""
    positive, negative = known & (truth > 0.5), known & (truth <= 0.5)
    asked = positive.any(-1) & negative.any(-1)  # [B, I]
    pairs = (positive[..., :, None] & negative[..., None, :])[asked]
    order = (np.sign(scores[..., :, None] - scores[..., None, :]) / 2 + 0.5)[asked]
    values = np.where(pairs, order, 0.0).sum((1, 2)) / pairs.sum((1, 2))
    return bootstrap.mean(values, episode[np.nonzero(asked)[0]])


def analyze(
    models: Sequence[str],
    dataset: str,
    *,
    split: str = "validation",
    num_windows: int = 2000,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
    on_model: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """
    Scores every measure of [`influence`] and the distance baselines against both truths, on the same windows for all
    models of the same lengths.

    Args:
        models: folders or Hub ids. Those trained alike with several seeds are averaged: they are of one kind, "C-JEPA" if
            their configuration hides objects in training, else "OC-JEPA".
        dataset, split: slots of simulated episodes with `state` and `contacts`.
        on_model: called with the results so far after each model.

    Returns:
        {"models", "counts", "rows", "means", "differences", ...}. A score is {"value", "low", "high"}, a 95 % interval over
        resampled episodes (the same for all models): it tells nothing about other training seeds, whose scores stand in
        `rows`. Scores: auroc and average_precision over all pairs; within_auroc, among the sources of a target; and
        matched_auroc, on positives and as many negatives that came as near.
    """
    loaded = load_slot_dataset(dataset, split, check_values=False)
    results: dict[str, Any] = {
        "dataset": loaded.metadata.get("source", {}).get("name") if loaded.metadata.get("source") else None,
        "split": split,
        "num_windows": num_windows,
        "seed": seed,
        **measured_on(device),
        "models": [],
        "counts": [],
        "rows": [],
    }
    bootstrap, simulated = VideoBootstrap(len(loaded), seed), {}
    collected: dict[tuple, dict[str, list[np.ndarray]]] = {}
    for name in models:
        model, processor = _open(name, device)
        windows = windows_of(
            model,
            loaded,
            image_processor=processor,
            num_windows=num_windows,
            seed=seed,
            simulated=simulated,
            progress="simulating" if progress else None,
        )
        kind = "C-JEPA" if model.config.masked_slots_range[1] and model.config.mask_probability else "OC-JEPA"
        results["models"].append({"name": str(name), "kind": kind, "visible_prefix": model.config.visible_prefix})
        for setting, truth in windows.truths.items():
            found = influence(
                model, windows.slots, actions=windows.actions, proprio=windows.proprio, setting=setting,
                entities=windows.entities, progress=f"{name}, {setting}" if progress else None,
            )  # fmt: skip
            values = truth.baselines | {n: v.numpy() for n, v in found.items()}
            for kind_of_truth in TRUTHS:
                counts, samples = _score(values, getattr(truth, kind_of_truth), truth.closest, windows, bootstrap)
                where = {"model": str(name), "kind": kind, "setting": setting, "truth": kind_of_truth}
                results["counts"].append({**where, **counts})
                for measure, part in samples.items():
                    scores = {score: interval(sample) for score, sample in part.items()}
                    results["rows"].append({**where, "measure": measure, **scores})
                    key = (setting, kind_of_truth, measure, kind)
                    for score, sample in part.items():
                        collected.setdefault(key, {}).setdefault(score, []).append(sample)
        results["means"], results["differences"] = _means(collected)
        if on_model is not None:
            on_model(results)
    return results


def _means(collected) -> tuple[list[dict], list[dict]]:
    means, differences = [], []
    averages = {
        key: {score: np.mean(samples, axis=0) for score, samples in part.items()} for key, part in collected.items()
    }
    for (setting, truth, measure, kind), part in averages.items():
        where = {"setting": setting, "truth": truth, "measure": measure}
        seeds = len(next(iter(collected[setting, truth, measure, kind].values())))
        means.append({**where, "kind": kind, "seeds": seeds, **{s: interval(v) for s, v in part.items()}})
        other = averages.get((setting, truth, measure, "OC-JEPA"))
        if (
            kind == "C-JEPA"
            and other is not None
            and all(len(other[s]) == len(v) for s, v in part.items() if s in other)
        ):
            both = {s: interval(v - other[s]) for s, v in part.items() if s in other}
            differences.append({**where, "difference": "C-JEPA - OC-JEPA", **both})
    return means, differences


def _open(name: str, device: str) -> tuple[CJepaModel, Any]:
    model = AutoModel.from_pretrained(name, use_safetensors=True).eval().to(device)
    if not isinstance(model, CJepaModel):
        raise ValueError(f"{name} holds a {type(model).__name__}: influence is analyzed for a CJepaModel")
    return model, None if model.slot_encoder is None else AutoImageProcessor.from_pretrained(name)


def print_analysis(results: Mapping[str, Any]) -> None:
    """The means of [`analyze`] as tables: one per setting and truth."""
    kinds = list(dict.fromkeys(row["kind"] for row in results["means"]))
    for setting in SETTINGS:
        for truth in TRUTHS:
            rows = [row for row in results["means"] if (row["setting"], row["truth"]) == (setting, truth)]
            counts = [row for row in results["counts"] if (row["setting"], row["truth"]) == (setting, truth)]
            title = f"{setting}: the entity {'touches' if truth == 'touches' else 'changes the path of'} the target"
            if not rows:
                print(f"\n{title}: no pairs of both kinds in {counts[0]['windows']} windows")
                continue
            first = counts[0]
            print(
                f"\n{title}. {first['positives']} of {first['pairs']} pairs, {first['windows']} windows of "
                f"{first['episodes']} episodes, {first['matched_pairs']} pairs matched by distance"
            )
            for kind in kinds:
                mine = [row for row in rows if row["kind"] == kind]
                if not mine:
                    continue
                if kind == "OC-JEPA" and setting == "masked":
                    print(
                        "(OC-JEPA never saw a hidden object in training: this says how far it is from it, not what it learned)"
                    )
                print(
                    f"{kind + ', ' + str(mine[0]['seeds']) + ' seed(s)':<22}{'AUROC':>22}{'matched':>22}{'within':>22}"
                    f"{'av. precision':>22}"
                )
                for row in mine:
                    cells = [row.get(s) for s in ("auroc", "matched_auroc", "within_auroc", "average_precision")]
                    print(f"  {row['measure']:<20}" + "".join(f"{_cell(cell):>22}" for cell in cells))


def _cell(score: Mapping[str, float] | None) -> str:
    if score is None or score["value"] is None:
        return "-"
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


# ---------------------------------------------------------------------------------------------------------- picture


def draw_example(
    model: str,
    dataset: str,
    path: str | os.PathLike,
    *,
    measure: str = "leave_one_out",
    split: str = "validation",
    num_windows: int = 2000,
    seed: int = 0,
) -> None:
    """Writes [`plot_influence`] on the future of the first of the windows in whose future entities touch."""
    net, processor = _open(model, "cpu")
    loaded = load_slot_dataset(dataset, split, check_values=False)
    windows = windows_of(net, loaded, image_processor=processor, num_windows=min(num_windows, 64), seed=seed)
    truth = windows.truths["future"].touches
    b = int(np.nan_to_num(truth).any((1, 2)).argmax())
    inputs = {name: getattr(windows, name) for name in ("slots", "actions", "proprio")}
    inputs = {name: value[b : b + 1] for name, value in inputs.items() if value is not None}
    found = influence(net, **inputs, setting="future", entities=windows.entities)
    if measure not in found:
        raise ValueError(f"measure {measure!r}: expected one of {', '.join(found)}")
    asked = np.flatnonzero(np.isfinite(windows.places[b]).all(-1))
    if windows.roles:
        asked = np.arange(len(windows.names))
    image = plot_influence(
        found[measure][0].numpy()[np.ix_(asked, asked)],
        windows.frames(b),
        windows.places[b][asked],
        [windows.names[k] for k in asked],
        touches=truth[b][np.ix_(asked, asked)],
        title=f"{measure}, {windows.episode[b]}",
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, format="PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def plot_influence(
    matrix: np.ndarray,
    frame: np.ndarray,
    places: np.ndarray,
    names: Sequence[str],
    *,
    touches: np.ndarray | None = None,
    title: str = "",
) -> Image.Image:
    """
    An influence matrix, and over a frame arrows from sources to targets, as thick as their influence.

    Args:
        matrix: float [I, E] of one window, NaN = not asked; shown relative to its largest entry.
        frame: uint8 [H, W, 3].
        places: [E, 2], x and y as shares of the frame, NaN = nowhere.
        names: of the E entities; the first I are the targets.
        touches: [I, E], 1 where the entity touches the target: these cells are framed.
    """
    matrix, places = np.asarray(matrix, dtype=float), np.asarray(places, dtype=float)
    if matrix.ndim != 2 or matrix.shape[1] != len(names) or places.shape != (len(names), 2):
        raise ValueError(
            f"matrix {matrix.shape}, places {places.shape}, {len(names)} names: expected [I, E], [E, 2], E"
        )
    largest = max(np.nanmax(matrix), 0.0) if np.isfinite(matrix).any() else 0.0
    share = matrix / largest if largest > 0 else np.where(np.isfinite(matrix), 0.0, np.nan)
    height = 384
    picture = cv2.resize(
        frame, (round(frame.shape[1] * height / frame.shape[0]), height), interpolation=cv2.INTER_AREA
    )
    panel = _matrix_panel(matrix, share, touches, names, height, title)
    spots = places * np.array(picture.shape[1::-1])
    for i, j in zip(*np.nonzero(share > 0.05)):
        if np.isfinite(spots[[i, j]]).all() and np.linalg.norm(spots[i] - spots[j]) > 1:
            # two arrows of a pair go side by side
            along = (spots[i] - spots[j]) / np.linalg.norm(spots[i] - spots[j])
            shift = 5 * np.array([-along[1], along[0]])
            ends = [tuple(np.rint(p).astype(int).tolist()) for p in (spots[j] + shift, spots[i] + shift)]
            cv2.arrowedLine(picture, *ends, (214, 39, 40), max(1, round(6 * share[i, j])), cv2.LINE_AA, tipLength=0.12)
    for name, spot in zip(names, spots):
        if np.isfinite(spot).all():
            _text(picture, name, (min(int(spot[0]) + 8, picture.shape[1] - 9 * len(name)), int(spot[1]) - 8), 0.45)
    return Image.fromarray(np.concatenate([panel, picture], axis=1))


def _matrix_panel(matrix, share, touches, names, height, title) -> np.ndarray:
    targets, entities = matrix.shape
    left, top = 110, 120
    cell = min(64, (height - top - 20) // targets)
    panel = np.full((height, max(left + cell * entities + 20, 300), 3), 255, np.uint8)
    _text(panel, title, (8, 22), 0.5)
    text = "row: predicted, column: used" + ("; framed: touch" if touches is not None else "")
    _text(panel, text, (8, 42), 0.4)
    for j, name in enumerate(names):
        label = np.full((cell, 70, 3), 255, np.uint8)
        _text(label, name, (2, cell // 2 + 4), 0.38)
        turned = np.rot90(label)
        panel[top - 72 : top - 2, left + j * cell : left + (j + 1) * cell] = turned
    for i in range(targets):
        _text(panel, names[i], (8, top + i * cell + cell // 2 + 4), 0.4)
        for j in range(entities):
            corner = (left + j * cell, top + i * cell)
            if not math.isfinite(share[i, j]):
                color = (225, 225, 225)
            else:
                color = tuple(round(255 + (c - 255) * max(share[i, j], 0.0)) for c in (31, 90, 160))
            opposite = (corner[0] + cell - 3, corner[1] + cell - 3)
            cv2.rectangle(panel, corner, opposite, color, -1)
            if touches is not None and touches[i, j] == 1:
                cv2.rectangle(panel, corner, opposite, (214, 39, 40), 3)
            if math.isfinite(share[i, j]):
                ink = (255, 255, 255) if share[i, j] > 0.55 else (0, 0, 0)
                cv2.putText(panel, f"{matrix[i, j]:.2g}", (corner[0] + 4, corner[1] + cell // 2 + 4),
                            cv2.FONT_HERSHEY_SIMPLEX, 0.34, ink, 1, cv2.LINE_AA)  # fmt: skip
    return panel


def _text(picture, text, corner, scale) -> None:
    cv2.putText(picture, text, corner, cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA)
