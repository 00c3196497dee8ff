"""`pipeline("counterfactual-rollout")`: what happens next in a video, and what would without, or with another, object."""

import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from transformers import Pipeline

from cjepa_hf.data.extract import encode_videos
from cjepa_hf.data.video import FrameVideo, open_videos
from cjepa_hf.imagination import (
    Act,
    Delay,
    Drop,
    Empty,
    Imagination,
    Intervention,
    Mask,
    Replace,
    imagine,
    is_empty,
)
from cjepa_hf.models.cjepa import CJepaModel
from cjepa_hf.models.savi import SaviModel
from cjepa_hf.slot_probe import SlotProbe, in_words

from .goal_planning import _default_image_processor

_REMOVALS = {"drop": Drop, "empty": Empty, "mask": Mask}
_KINDS = (*_REMOVALS, "replace", "delay", "act")
_PREPROCESS_PARAMETERS = ("seed",)
_FORWARD_PARAMETERS = (
    "interventions",
    "num_frames",
    "start",
    "frame_skip",
    "entries",
    "match_slots",
    "empty_slot",
    "effect_threshold",
    "gif",
)


class CounterfactualRolloutPipeline(Pipeline):
    """
    Imagines a video's continuation with a [`CJepaModel`], as it is and under interventions on its objects.

    ```python
    imagine = pipeline("counterfactual-rollout", model=model)
    result = imagine("video.mp4", interventions=["drop:2", "empty:red cube"], num_frames=32, gif="what_if.gif")
    result["interventions"][0]["affected"]      # [{"slot": 1, "from_frame": 140, "largest_effect": 0.8}, ...]
    ```

    Input: a video, or a dictionary, or a list of them. A video is a path (whatever `open_videos` reads, one video), frames
    (uint8 RGB [T, H, W, 3], or a list of images), or slots (float [T, N, D]). A dictionary holds `video` or `slots`, and
        interventions: overrides the option of the same name.
        actions: [T' * frame_skip, a] in environment units, for a model that takes them: those of the T observed steps and
            of all imagined ones but the last, T' = T + num_frames - 1. The frames of a video are then taken frame_skip
            apart; slots are steps already.
        proprio: [T, P] in environment units.

    An intervention is one of `cjepa_hf.imagination` (read there what each means), or in words "drop:SLOT",
    "empty:SLOT", "mask:SLOT", "delay:SLOT:FRAMES", or a dictionary {"kind": "replace", "slot": SLOT, "by": slots} or
    {"kind": "act", "actions": as above}; a list of them means all together. SLOT is a number or, with a probe, words such
    as "red metal cube".

    Options, at construction or at the call:
        interventions ([]), num_frames (32; follows from actions), start, frame_skip (the model's), entries (False),
        match_slots (False), empty_slot, effect_threshold: see [`imagine`].
        seed (0): of encoders with random initial slots.
        gif: file for a moving picture of all rollouts side by side. It needs an encoder that draws images
            (`decode`) or one or a probe that tells positions.

    At construction also: `slot_encoder` where the model holds none, `image_processor`, `probe` (a [`SlotProbe`] or a
    folder with one; default: the one beside the model).

    Output: a dictionary of numpy arrays (K imagined frames, I interventions)
        factual [K, N, D], slots [I, K, N, D] (NaN where a slot was dropped), effect [I, K, N] (slot units),
        interventions: per intervention {"intervention": as given, "affected": [{"slot", "object" (with a probe),
            "from_frame" (of the video), "largest_effect"}]}, the most affected first,
        paths: {"factual" [K, N, 2], "slots" [I, K, N, 2]} where the encoder or the probe tells positions (NaN where a slot
            was dropped or is empty), else None,
        start: first imagined frame; history: steps the model saw; short_history: fewer than it was trained with,
        observed [T, N, D], objects (with a probe: what each slot holds, or None), gif (the path, or None).

    Errors are ValueErrors: see [`imagine`]; also objects that are not there or not unique.
    """

    _load_tokenizer = False
    _load_image_processor = None
    _load_video_processor = False
    _load_feature_extractor = False
    _load_processor = False

    def __init__(self, model: CJepaModel, *args, slot_encoder=None, probe=None, **kwargs):
        if not isinstance(model, CJepaModel):
            raise ValueError(f"counterfactual-rollout needs a CJepaModel, got {type(model).__name__}")
        super().__init__(model, *args, **kwargs)
        self.slot_encoder = model.slot_encoder if slot_encoder is None else slot_encoder.to(self.device).eval()
        self.probe = find_probe(probe, model, self.slot_encoder)
        if self.image_processor is None and self.slot_encoder is not None:
            self.image_processor = _default_image_processor(self.slot_encoder.config)

    def __call__(self, inputs, **kwargs):
        """See the class."""
        if isinstance(inputs, list) and not inputs:
            return []
        if isinstance(inputs, tuple) or (isinstance(inputs, list) and isinstance(inputs[0], Image.Image)):
            inputs = {"video": list(inputs)}
        return super().__call__(inputs, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save the model, its image processor and the probe. (The inherited method would copy code that asks for trust.)"""
        self.model.save_pretrained(save_directory, **kwargs)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(save_directory)
        if self.probe is not None:
            self.probe.save_pretrained(save_directory)

    def _sanitize_parameters(self, **parameters):
        known = (*_PREPROCESS_PARAMETERS, *_FORWARD_PARAMETERS)
        if unknown := set(parameters) - set(known):
            raise ValueError(f"unknown option(s) {sorted(unknown)}; counterfactual-rollout takes {sorted(known)}")
        before = {name: parameters.pop(name) for name in _PREPROCESS_PARAMETERS if name in parameters}
        return before, parameters, {}

    def preprocess(self, inputs: Any, seed: int = 0) -> dict[str, Any]:
        inputs = inputs if isinstance(inputs, Mapping) else {"video": inputs}
        known = {"video", "slots", "interventions", "actions", "proprio"}
        if set(inputs) - known or ("video" in inputs) == ("slots" in inputs):
            raise ValueError(
                f'expected a dictionary with "video" or "slots" and perhaps "interventions", "actions", "proprio"; '
                f"got {sorted(inputs)}"
            )
        stride = self.model.config.frame_skip if self.model.config.action_size else 1
        video = inputs.get("video", inputs.get("slots"))
        slots = video_slots(
            video, self.slot_encoder, self.image_processor, self.model.config, seed=seed, stride=stride
        )
        prepared = {"slots": slots, "raw": {"interventions": inputs.get("interventions")}}
        if inputs.get("actions") is not None:
            prepared["actions"] = self._actions(inputs["actions"])
        if inputs.get("proprio") is not None:
            proprio = torch.as_tensor(np.asarray(inputs["proprio"], dtype=np.float32)).to(self.model.device)
            prepared["proprio"] = self.model.normalize_proprio(proprio)
        return prepared

    def _actions(self, actions) -> torch.Tensor:
        """Normalised blocks [steps, A] of raw actions [steps * frame_skip, a]."""
        config = self.model.config
        if not config.action_size:
            raise ValueError("actions were given, but this model takes none: leave them out")
        raw, width = np.asarray(actions, dtype=np.float32), config.action_size // config.frame_skip
        if raw.ndim != 2 or raw.shape[1] != width or len(raw) % config.frame_skip:
            raise ValueError(f"actions have shape {raw.shape}: expected (steps * {config.frame_skip}, {width})")
        blocks = torch.from_numpy(raw.reshape(-1, config.action_size)).to(self.model.device)
        return self.model.normalize_actions(blocks)

    def _forward(
        self,
        inputs: dict[str, Any],
        *,
        interventions: Sequence = (),
        num_frames: int | None = None,
        start: int | None = None,
        frame_skip: int | None = None,
        entries: bool = False,
        match_slots: bool = False,
        empty_slot=None,
        effect_threshold: float | None = None,
        gif: str | os.PathLike | None = None,
    ) -> dict[str, Any]:
        config, slots = self.model.config, inputs["slots"]
        given = inputs["raw"]["interventions"]
        given = list(interventions if given is None else given)
        plans = [self._parsed(one, slots) for one in given]
        start = len(slots) if start is None else start
        actions, proprio = inputs.get("actions"), inputs.get("proprio")
        if actions is not None:
            available = len(actions) - start + 1
            num_frames = available if num_frames is None else num_frames
            if num_frames != available or num_frames < 1:
                raise ValueError(
                    f"actions of {len(actions)} steps: {start} observed steps and num_frames={num_frames} need "
                    f"{start + (num_frames or 1) - 1}"
                )
        elif config.action_size:
            raise ValueError(
                f'this model takes actions: give "actions" [steps * {config.frame_skip}, '
                f"{config.action_size // config.frame_skip}] in environment units"
            )
        if frame_skip is None:
            frame_skip = 1 if config.action_size else config.frame_skip
        if empty_slot is None and self.probe is not None:
            empty_slot = self.probe.empty_slot
        if empty_slot is None:
            empty_slot = getattr(self.slot_encoder, "empty_slot", None)
        result = imagine(
            self.model,
            slots[None],
            plans,
            num_frames=32 if num_frames is None else num_frames,
            start=start,
            frame_skip=frame_skip,
            actions=None if actions is None else actions[None],
            proprio=None if proprio is None else proprio[None, :start],
            empty_slot=None if empty_slot is None else torch.as_tensor(empty_slot),
            entries=entries,
            match_slots=match_slots,
            effect_threshold=effect_threshold,
        )
        paths = None
        locate = getattr(self.slot_encoder, "positions", None)
        if locate is None and self.probe is not None and self.probe.has_positions:
            locate = self.probe.positions
        if locate is not None:
            paths = {"factual": result.factual[0], "slots": result.slots[0]}
            paths = {name: _paths(locate(slots), slots, empty_slot, self.probe) for name, slots in paths.items()}
        if gif is not None:
            names = ["as it is", *(_name(one) for one in given)]
            write_comparison(Path(gif), result, self.slot_encoder, paths, names, frame_skip)
        return {"result": result, "paths": paths, "observed": slots, "raw": {"given": given, "gif": gif}}

    def _parsed(self, intervention, slots) -> list[Intervention]:
        parts = intervention if isinstance(intervention, list | tuple) else [intervention]
        return [self._parsed_one(one, slots) for one in parts]

    def _parsed_one(self, one, slots) -> Intervention:
        if isinstance(one, Drop | Empty | Mask | Replace | Delay | Act):
            return one
        given = one
        if isinstance(one, str):
            kind, _, rest = one.partition(":")
            slot, _, number = rest.partition(":")
            one = {"kind": kind, "slot": slot, **({"frames": number} if number else {})}
        if not isinstance(one, Mapping) or one.get("kind") not in _KINDS:
            raise ValueError(
                f'{given!r} is no intervention: expected "drop:SLOT", "empty:SLOT", "mask:SLOT", "delay:SLOT:FRAMES", a '
                f"dictionary with a kind of {_KINDS}, or an object of cjepa_hf.imagination"
            )
        kind = one["kind"]
        needed = {"replace": {"slot", "by"}, "delay": {"slot", "frames"}, "act": {"actions"}}.get(kind, {"slot"})
        if set(one) != {"kind", *needed}:
            raise ValueError(f"{kind} takes {sorted(needed)}, got {sorted(set(one) - {'kind'})}")
        if kind == "act":
            return Act(self._actions(one["actions"]))
        slot = one["slot"]
        if isinstance(slot, str):
            slot = int(slot) if slot.strip().lstrip("-").isdigit() else find_slot(self.probe, slots, slot)
        if kind == "delay":
            try:
                return Delay(slot, int(one["frames"]))
            except ValueError:
                raise ValueError(f"delay: frames={one['frames']!r} must be an integer") from None
        if kind == "replace":
            return Replace(slot, torch.as_tensor(np.asarray(one["by"], dtype=np.float32)))
        return _REMOVALS[kind](slot)

    def postprocess(self, outputs: dict[str, Any]) -> dict[str, Any]:
        result: Imagination = outputs["result"]
        start, history = int(result.start[0]), int(result.history[0])
        objects = None if self.probe is None else self.probe.describe(outputs["observed"])
        reports = []
        for index, given in enumerate(outputs["raw"]["given"]):
            largest = result.effect[0, index].amax(dim=0)
            affected = []
            for slot in result.affected[0, index].nonzero().flatten().tolist():
                row = {"slot": slot, "from_frame": start + int(result.affected_from[0, index, slot])}
                row["largest_effect"] = float(largest[slot])
                if objects is not None:
                    row["object"] = objects[slot] and in_words(objects[slot])
                affected.append(row)
            affected.sort(key=lambda row: -row["largest_effect"])
            reports.append({"intervention": given, "affected": affected})
        gif = outputs["raw"]["gif"]
        return {
            "factual": result.factual[0].cpu().numpy(),
            "slots": result.slots[0].cpu().numpy(),
            "effect": result.effect[0].cpu().numpy(),
            "interventions": reports,
            "paths": None
            if outputs["paths"] is None
            else {name: value.float().cpu().numpy() for name, value in outputs["paths"].items()},
            "start": start,
            "history": history,
            "short_history": history < self.model.config.history_length,
            "observed": outputs["observed"].float().cpu().numpy(),
            "objects": objects,
            "gif": None if gif is None else str(gif),
        }


def _name(intervention) -> str:
    """A short title of an intervention as the user gave it."""
    if isinstance(intervention, str):
        return intervention
    if isinstance(intervention, Mapping):
        return ":".join(str(intervention[key]) for key in ("kind", "slot", "frames") if key in intervention)
    if isinstance(intervention, list | tuple):
        return ", ".join(map(_name, intervention))
    return f"{type(intervention).__name__.lower()} {getattr(intervention, 'slot', '')}".strip()


# ------------------------------------------------------------------------------------------- videos, probes (shared)


@torch.no_grad()
def video_slots(video, encoder, image_processor, config, *, seed: int = 0, stride: int = 1) -> torch.Tensor:
    """Slots float32 [T, N, D] of a path, frames [T, H, W, 3], a list of images, or slots; `stride` of a video's frames."""
    size = config.slot_size
    if not isinstance(video, str | os.PathLike):
        if isinstance(video, list | tuple) and video and isinstance(video[0], Image.Image):
            video = np.stack([np.asarray(image.convert("RGB")) for image in video])
        array = video.detach().cpu() if torch.is_tensor(video) else torch.as_tensor(np.asarray(video))
        if array.ndim == 3:
            if not array.is_floating_point() or array.shape[-1] != size or not len(array):
                raise ValueError(
                    f"three axes, so these should be float slots [T, N, D={size}], got {array.dtype} "
                    f"{list(array.shape)}; frames are uint8 [T, H, W, 3]"
                )
            return array.float()
        if array.ndim != 4 or array.dtype != torch.uint8:
            raise ValueError(
                f"a video is a path, uint8 frames [T, H, W, 3], a list of images or slots [T, N, D={size}]; got "
                f"{array.dtype} {list(array.shape)}"
            )
        frames = array.numpy()
        opened = FrameVideo(lambda: lambda part: frames[part], len(frames), "video")
    else:
        found = open_videos(video)
        if len(found) != 1:
            raise ValueError(f"{video} holds {len(found)} videos: name one of them ({found[0].name}, ...)")
        opened = found[0]
    if encoder is None:
        raise ValueError(
            "a video was given, and there is no slot encoder: pass slot_encoder=... to pipeline(), or encode it yourself "
            "and give slots [T, N, D]"
        )
    (encoded,) = next(encode_videos([[opened]], encoder, image_processor, seed=seed))
    if encoded.error is not None:
        raise ValueError(f"{opened.name} cannot be read: {encoded.error}") from encoded.error
    slots = torch.from_numpy(np.concatenate(encoded.slots))[::stride]
    if slots.shape[-1] != size:
        raise ValueError(f"the slot encoder makes slots of size {slots.shape[-1]}, the model takes {size}")
    return slots


def find_probe(probe, *models) -> SlotProbe | None:
    """
    The probe given as an object, folder or Hub id, else the one beside the first model that has one, else None. ValueError
    for a probe of other slots.
    """
    models = [model for model in models if model is not None]
    if isinstance(probe, str | os.PathLike):
        probe = SlotProbe.from_pretrained(probe)
    for model in models if probe is None else ():
        if origin := getattr(model, "loaded_from", None):
            try:
                probe = SlotProbe.from_pretrained(**origin)
                break
            except FileNotFoundError:
                continue
            except ConnectionError as error:  # most models have none: what needs no probe goes on
                warnings.warn(str(error), stacklevel=2)
    sizes = (getattr(getattr(model, "config", None), "slot_size", None) for model in models)
    size = next((size for size in sizes if size is not None), None)
    if probe is not None and size is not None and len(probe.weight) - 1 != size:
        raise ValueError(
            f"the probe reads slots of size {len(probe.weight) - 1}, the model's have {size}: give one that was fitted on "
            "slots of the model's encoder"
        )
    return probe


def find_slot(probe: SlotProbe | None, slots: torch.Tensor, words: str) -> int:
    """The slot of a video [T, N, D] that holds the described object; an error that says so without a probe."""
    if probe is None or not probe.attributes:
        raise ValueError(
            f'which slot holds "{words}" cannot be told: there is no probe that reads attributes from slots. Fit one '
            "(cjepa_hf.slot_probe.SlotProbe.fit), save it beside the model or pass probe=..., or name the slot by number"
        )
    return probe.find(slots, words)


# ---------------------------------------------------------------------------------------------------------- pictures


def _paths(positions: torch.Tensor, slots: torch.Tensor, empty_slot, probe: SlotProbe | None) -> torch.Tensor:
    """Positions [..., N, 2] of slots [..., N, D], NaN where a slot is empty: what is not there is nowhere."""
    gone = torch.zeros(slots.shape[:-1], dtype=torch.bool, device=positions.device)
    if empty_slot is not None:
        scenes = slots.nan_to_num().view(-1, *slots.shape[-3:])  # dropped slots are NaN
        gone |= is_empty(scenes, torch.as_tensor(empty_slot)).view(gone.shape).to(gone.device)
    if probe is not None:  # an object that leaves is for some steps between there and empty
        gone |= ~probe.present(slots).to(gone.device)
    return positions.masked_fill(gone.unsqueeze(-1), torch.nan)


_SIZE = 192
_COLORS = [
    (214, 39, 40), (31, 119, 180), (44, 160, 44), (255, 127, 14), (148, 103, 189), (140, 86, 75), (227, 119, 194),
    (23, 190, 207),
]  # fmt: skip


def write_comparison(
    path: Path, result: Imagination, encoder, paths: dict | None, names: Sequence[str], frame_skip: int = 1
) -> None:
    """
    All rollouts of the first scene side by side, as a GIF: decoded frames where the encoder draws, and paths so far. Of
    `frame_skip` interleaved rollouts the one that goes on from the last observed frame is drawn: the others imagine the same
    from a little earlier, and may differ.
    """
    count = result.factual.shape[1]
    shown = list(range(frame_skip - 1, count, frame_skip)) or list(range(count))
    keeps = torch.cat([torch.ones_like(result.present[0, :1]), result.present[0]]) if len(names) > 1 else None
    rollouts = [r[shown] for r in (result.factual[0], *result.slots[0])]
    config = getattr(encoder, "config", None)
    scene, view = (getattr(config, name, None) for name in ("scene_size", "view_size"))
    size = (_SIZE, _SIZE if view is None else round(_SIZE * view[1] / view[0]))  # width, height
    drawn = None
    if hasattr(encoder, "decode"):
        panels = [_decoded(encoder, r, None if keeps is None else keeps[i], size) for i, r in enumerate(rollouts)]
        drawn = None if panels[0] is None else panels
    if drawn is None and paths is None:
        raise ValueError(
            "gif: nothing can be drawn, as the slot encoder decodes no images and nothing tells positions from slots; pass "
            "a probe with positions"
        )
    points = None
    if paths is not None:
        tracks = (
            torch.cat([paths["factual"][None], paths["slots"]])[:, shown].float().cpu().numpy()
        )  # [1 + I, K, N, 2]
        if drawn is None:
            low, high = np.nanmin(tracks, axis=(0, 1, 2)), np.nanmax(tracks, axis=(0, 1, 2))
            points = 8 + (tracks - low) / max(float((high - low).max()), 1e-6) * (np.array(size) - 16)
        elif scene is not None and hasattr(encoder, "positions"):
            points = tracks / scene * np.array(size)
        elif view is not None and hasattr(encoder, "positions"):  # from the middle of the view
            points = (tracks / np.asarray(view) + 0.5) * np.array(size)
    frames = []
    for k, frame in enumerate(shown):
        cells = []
        for i, name in enumerate(names):
            cell = np.full((size[1], size[0], 3), 255, np.uint8) if drawn is None else drawn[i][k].copy()
            if points is not None:
                for slot in range(points.shape[2]):
                    track = points[i, : k + 1, slot]
                    there = np.isfinite(track).all(axis=-1)
                    if there.any():
                        color, line = _COLORS[slot % len(_COLORS)], (track[there] * 8).round().astype(np.int32)
                        cv2.polylines(cell, [line], False, color, 1, cv2.LINE_AA, 3)
                        if there[-1]:
                            cv2.circle(cell, tuple(int(v) for v in line[-1]), 24, color, -1, cv2.LINE_AA, 3)
            header = np.full((18, size[0], 3), 255, np.uint8)
            title = f"{name}, frame {int(result.start[0]) + frame}"
            cv2.putText(header, title, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (60, 60, 60), 1, cv2.LINE_AA)
            cells.append(np.pad(np.concatenate([header, cell]), ((2, 2), (2, 2), (0, 0)), constant_values=255))
        frames.append(np.concatenate(cells, axis=1))
    sample = np.concatenate([f.reshape(1, -1, 3) for f in frames[:: max(len(frames) // 4, 1)]], axis=1)
    palette = Image.fromarray(sample).quantize(192)  # one for all frames, so that still parts do not flicker
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        images[0].save(temporary, format="GIF", save_all=True, append_images=images[1:], duration=120, loop=0)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@torch.no_grad()
def _decoded(encoder, slots, keep, size) -> np.ndarray | None:
    """uint8 [K, H, W, 3] (`size` is W, H) of slots [K, N, D] without the dropped ones; None if the encoder draws nothing."""
    if getattr(encoder, "decoder", encoder) is None:
        return None
    kept = range(slots.shape[1]) if keep is None else keep.nonzero().flatten().tolist()
    options = {"slot_indices": list(kept)} if "slot_indices" in inspect.signature(encoder.decode).parameters else {}
    device = next(encoder.parameters()).device
    drawn = encoder.decode(slots[:, list(kept)].to(device), **options).reconstruction
    if drawn.ndim != 4 or drawn.shape[1] != 3:
        return None
    if isinstance(encoder, SaviModel):  # it draws in [-1, 1]
        drawn = drawn / 2 + 0.5
    array = (drawn.float().clamp(0, 1) * 255).round().byte().movedim(1, -1).cpu().numpy()
    return np.stack([cv2.resize(image, size, interpolation=cv2.INTER_CUBIC) for image in array])
