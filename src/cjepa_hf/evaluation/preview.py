"""Pictures of what a slot encoder sees: masks over the frames, and how well they fit where true masks exist."""

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from cjepa_hf.data.extract import Encoded, drawn_size, encode_videos, open_encoder
from cjepa_hf.data.video import Video, open_source

from .metrics import foreground_ari, identity_switches

__all__ = ["mask_metrics", "overlay", "write_previews"]

logger = logging.getLogger(__name__)

# One color per slot, the same in every frame and every video; after them the colors repeat.
PALETTE = np.array(
    [(228, 228, 228), (214, 39, 40), (44, 160, 44), (31, 119, 180), (255, 187, 0), (148, 103, 189), (23, 190, 207),
     (227, 119, 194), (140, 86, 75), (127, 127, 127), (188, 189, 34), (0, 0, 0)], dtype=np.uint8,
)  # fmt: skip
_SMALLEST = 128  # px: smaller frames are enlarged
_SHOWN = 8  # frames in a PNG


class _Clip(Video):
    """The first `length` frames of a video."""

    def __init__(self, video: Video, length: int):
        super().__init__(video.name)
        self.video, self.length = video, length

    def __len__(self) -> int:
        return min(len(self.video), self.length)

    def _read(self, size, start, stop, stride):
        return self.video._read(size, start, min(stop or self.length, self.length), stride)


def write_previews(
    source,
    encoder: str | os.PathLike | torch.nn.Module,
    output_dir: str | os.PathLike,
    *,
    num_videos: int = 4,
    num_frames: int = 64,
    split: str | None = None,
    image_processor: Callable | None = None,
    device: str | torch.device | None = None,
    batch_size: int = 64,
    seed: int = 0,
    render_resolution: int | None = None,
    **source_arguments,
) -> dict:
    """
    Encode the beginning of some videos and write `<video>.png` (frames above their masks), `<video>.gif` (both side by
    side) and `metrics.json` to `output_dir`. Where the true masks are known they are shown beside.

    Args:
        source, encoder, image_processor, device, batch_size, seed, render_resolution: as [`extract_slots`].
        num_videos: evenly spaced over the split.
        num_frames: of each video.
        split: default: validation where it has that many videos, else the largest.
        source_arguments: of [`open_source`].

    Returns:
        The content of `metrics.json`: `videos` (see [`mask_metrics`]; with a `note`, also logged, where a frame has more
        objects than the encoder has slots), the damaged ones under `skipped`, and means over the videos that have true
        masks.
    """
    if num_videos < 1 or num_frames < 1:
        raise ValueError(f"num_videos={num_videos} and num_frames={num_frames} must be at least 1")
    model, image_processor, description = open_encoder(encoder, None, image_processor, device)
    source_arguments["render_resolution"] = render_resolution or drawn_size(model)
    opened = open_source(source, splits=None if split is None else [split], **source_arguments)
    if split is None:
        enough = len(opened.splits.get("validation", ())) >= num_videos
        split = "validation" if enough else max(opened.splits, key=lambda name: len(opened.splits[name]))
    videos = opened.splits[split]
    chosen = [videos[i] for i in sorted({round(x) for x in np.linspace(0, len(videos) - 1, num_videos)})]
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    result = {"source": opened.name, "split": split, "encoder": description, "videos": [], "skipped": []}
    groups = ([_Clip(video, num_frames)] for video in chosen)  # one at a time: masks are large
    encoded = encode_videos(groups, model, image_processor, batch_size=batch_size, seed=seed, keep_masks=True)
    for video, (job,) in zip(chosen, encoded):
        try:
            result["videos"].append(_preview(video, job, folder, num_frames))
        except ValueError as error:
            result["skipped"].append({"episode_id": video.name, "reason": str(error)})
    for key in ("foreground_ari", "switches_per_100_frames"):
        values = [row[key] for row in result["videos"] if row.get(key) is not None]
        result[key] = float(np.mean(values)) if values else None
    _replace(folder / "metrics.json", lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))
    if not result["videos"]:
        raise ValueError(f"{opened.name}: no video could be shown; {result['skipped'][0]}")
    return result


def _preview(video: Video, job: Encoded, folder: Path, num_frames: int) -> dict:
    if job.error is not None:
        raise ValueError(f"{type(job.error).__name__}: {job.error}") from job.error
    frames = video.frames(0, num_frames)
    masks = np.concatenate(job.masks)
    labels = slot_of_pixel(masks, frames.shape[1:3])
    row = {"name": video.name, "frames": len(frames)}
    panels = [frames, overlay(frames, labels)]
    true = video.segments()
    if true is not None:
        true = true[: len(frames)]
        row |= mask_metrics(true, labels)
        objects = max(len(np.setdiff1d(frame, 0)) for frame in true)
        if objects > masks.shape[1]:
            row["note"] = (
                f"{objects} objects in one frame, and the encoder has {masks.shape[1]} slots: some must share one. Train "
                f"an encoder with at least {objects + 1}, one of them for the background"
            )
            logger.warning("%s: %s", video.name, row["note"])
        panels.append(overlay(frames, true))
    scale = -(-_SMALLEST // min(frames.shape[1:3]))
    panels = [np.stack([_enlarged(frame, scale) for frame in panel]) for panel in panels]
    name = re.sub(r"[^\w.-]+", "_", video.name)
    shown = np.unique(np.linspace(0, len(frames) - 1, _SHOWN).round().astype(int))
    picture = np.concatenate([np.concatenate(list(panel[shown]), axis=1) for panel in panels])
    _replace(folder / f"{name}.png", lambda path: Image.fromarray(picture).save(path, format="PNG"))
    _replace(folder / f"{name}.gif", lambda path: _write_gif(path, np.concatenate(panels, axis=2), video.fps or 10))
    return row


def slot_of_pixel(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """masks [T, N, H', W'] -> the slot that has most of each pixel, int [T, H, W]; masks are enlarged bilinearly."""
    parts = torch.from_numpy(masks).split(16)
    scaled = [torch.nn.functional.interpolate(part, size, mode="bilinear", align_corners=False) for part in parts]
    return torch.cat([part.argmax(1) for part in scaled]).numpy()


def overlay(frames: np.ndarray, labels: np.ndarray, strength: float = 0.6) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] tinted by label, int [T, H, W]: one color per label, always the same."""
    colors = PALETTE[labels % len(PALETTE)]
    gray = frames.mean(axis=-1, keepdims=True)  # so that the scene's own colors are not taken for labels
    return (gray * (1 - strength) + colors * strength).astype(np.uint8)


def mask_metrics(true: np.ndarray, labels: np.ndarray) -> dict:
    """
    `foreground_ari`: mean adjusted Rand index of the pixels that are not background. `switches_per_100_frames`: how often
    an object changes the slot that overlaps it most (intersection over union), all objects together. None where no
    frame has an object.

    Args:
        true: int [T, H, W], 0 = background.
        labels: int [T, H, W], the slot of each pixel.
    """
    if true.shape != labels.shape:
        raise ValueError(f"true masks {true.shape} and frames {labels.shape} are not of the same shape")
    if not (true > 0).any():
        return {"foreground_ari": None, "switches_per_100_frames": None}
    objects, slots = np.unique(true[true > 0]), np.arange(labels.max() + 1)
    slot_of_object = np.full((len(true), len(objects)), -1)
    for t, (mine, theirs) in enumerate(zip(labels, true)):
        mine, theirs = mine.ravel()[:, None] == slots, theirs.ravel()[:, None] == objects
        both = mine.T.astype(np.int32) @ theirs.astype(np.int32)
        either = mine.sum(0)[:, None] + theirs.sum(0) - both
        seen = theirs.any(0)
        slot_of_object[t, seen] = (both / np.maximum(either, 1)).argmax(0)[seen]
    return {
        "foreground_ari": foreground_ari(true, labels),
        "switches_per_100_frames": 100 * identity_switches(slot_of_object) / len(true),
    }


def _enlarged(frame: np.ndarray, scale: int) -> np.ndarray:
    return cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST) if scale > 1 else frame


def _write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    # One palette for all frames, or the colors of the masks would change from frame to frame.
    some = frames[np.unique(np.linspace(0, len(frames) - 1, 8).round().astype(int))]
    palette = Image.fromarray(np.concatenate(list(some))).quantize(256)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    duration = max(20, round(1000 / fps / 10) * 10)  # GIF counts in hundredths of a second
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=duration, loop=0)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
