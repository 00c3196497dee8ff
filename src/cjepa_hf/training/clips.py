"""What the trainings of video encoders share: clips to train on, and how a model that draws its input is evaluated."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from ..data.segments import foreground_ari
from ..data.video import Video, open_source, push_t_segments
from ..simulators.push_t import random_states
from ..simulators.rendering import TABLE_SIZE, render_push_t
from .arguments import TrainArguments, config_arguments, config_overrides, parse_arguments
from .trainer import TrainResult, make_accelerator, result_files, train_and_save, training_results

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ClipTrainArguments(TrainArguments):
    """Arguments of the video encoders' trainings beside [`TrainArguments`] and the fields of the model's config."""

    fixed_on_resume: ClassVar = (
        *TrainArguments.fixed_on_resume,
        "train_split",
        "clip_length",
        "frame_stride",
        "flip_probability",
        "render_resolution",
    )

    # > Parameters that control the clips
    dataset: str | None = HfArg(
        default=None,
        help="Videos: whatever cjepa_hf.data.video opens (files, folders, tar shards, a collected dataset, a Hub id with "
        "a Video column, ...); default: our Push-T, where every object moves at random.",
    )
    train_split: str = HfArg(default="train", help="Split to train on.")
    validation_split: str = HfArg(default="validation", help="Split to evaluate on; none: no evaluation.")
    clip_length: int = HfArg(default=6, help="Frames of a clip.")
    frame_stride: int = HfArg(default=1, help="A clip takes every so many-th frame of its video.")
    flip_probability: float = HfArg(default=0.0, help="Share of the clips that are mirrored, left to right.")
    num_clips: int = HfArg(default=20_000, help="Different clips of our Push-T; of videos, every window is a clip.")
    num_eval_clips: int = HfArg(default=64, help="Clips that our Push-T is evaluated on.")
    render_resolution: int = HfArg(default=64, help="Pixels per side of frames that a simulator draws.")

    def __post_init__(self):
        super().__post_init__()
        for name in ("clip_length", "frame_stride", "num_clips", "num_eval_clips", "render_resolution"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability must be in [0, 1], got {self.flip_probability!r}")


# --- clips -----------------------------------------------------------------------------------------------------------


class VideoClips(torch.utils.data.Dataset):
    """Every window of `clip_length` frames, `stride` apart, of every video, as `{"frames": uint8 [T, H, W, 3]}`, with
    `"segments": int64 [T, H, W]` where asked for and known of the first readable video (then of all, or it is damaged).

    A damaged video is reported once, by name. One whose header cannot be read is left out; a window of any other is
    replaced by one of the next video.

    Raises:
        ValueError: no video is long enough.
        ImportError: the package that reads this kind of source is not installed.
    """

    def __init__(
        self, videos: Sequence[Video], clip_length: int, stride: int = 1, *, flip: float = 0.0, segments: bool = False
    ):
        self.span, self.stride, self.flip = (clip_length - 1) * stride + 1, stride, flip
        self.damaged: set[str] = set()
        lengths = np.zeros(len(videos), np.int64)
        for i, video in enumerate(videos):
            with self._reported(video):
                lengths[i] = len(video)
        self.videos = [video for video, length in zip(videos, lengths) if length >= self.span]
        if not self.videos:
            damaged = f"; damaged: {', '.join(sorted(self.damaged)[:5])}" if self.damaged else ""
            raise ValueError(
                f"none of {len(videos)} videos has the {self.span} frames of a clip (clip_length={clip_length}, "
                f"frame_stride={stride}); the longest has {lengths.max(initial=0)}{damaged}"
            )
        short = len(videos) - len(self.videos) - len(self.damaged)
        if short:
            logger.warning("%d of %d videos are shorter than a clip of %d frames", short, len(videos), self.span)
        self.ends = np.cumsum(lengths[lengths >= self.span] - self.span + 1)
        self.segments = segments and self._know_segments()

    @contextmanager
    def _reported(self, video: Video) -> Iterator[None]:
        """Whatever a decoder raises is the fault of the video, which is then reported once."""
        try:
            yield
        except ImportError:
            raise
        except Exception as error:
            if video.name not in self.damaged:
                self.damaged.add(video.name)
                logger.warning("video %s is damaged and passed over: %s", video.name, error)

    def _know_segments(self) -> bool:
        for video in self.videos:
            with self._reported(video):
                return video.segments() is not None
        return False

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        video = int(np.searchsorted(self.ends, index, side="right"))
        start = index - (int(self.ends[video - 1]) if video else 0)
        for attempt in range(len(self.videos)):
            chosen = self.videos[(video + attempt) % len(self.videos)]
            with self._reported(chosen):
                first, frames = self._window(chosen, start)
                clip = {"frames": frames}
                if self.segments:
                    segments = chosen.segments()
                    if segments is None:
                        raise ValueError("it has no segments, which the first video has")
                    clip["segments"] = np.asarray(segments[first : first + self.span : self.stride], np.int64)
                return _flipped(clip, self.flip)
        raise ValueError(f"none of the {len(self.videos)} videos can be read: " + ", ".join(sorted(self.damaged)[:5]))

    def _window(self, video: Video, start: int) -> tuple[int, np.ndarray]:
        """A window of `video` and its first frame: `start`, or one that exists where the video is shorter."""
        counted = video.counted
        length = len(video) if counted is None else counted
        if length < self.span:
            raise ValueError(
                f"it announced {len(video)} frames and has {length}, fewer than the {self.span} of a clip"
            )
        first = start % (length - self.span + 1)
        try:
            frames = video.frames(first, first + self.span, self.stride)
            if len(frames) * self.stride < self.span:
                raise ValueError(f"it announced {length} frames and ends before them")
        except ValueError:
            if video.counted == counted:
                raise
            return self._window(video, start)  # a file that announces too many was read to its end, and counted
        return first, frames


class RandomPushT(torch.utils.data.Dataset):
    """Clips of our Push-T in which agent, block and goal each move at random: `{"frames": uint8 [T, H, W, 3]}` and,
    where asked for, `"segments": int64 [T, H, W]` (0 background, 1 agent, 2 goal, 3 block).

    In episodes the goal never moves and the block only when it is pushed; an encoder that learns objects from what
    moves together could not tell them from the background. Clip i is a function of `seed` and i.
    """

    def __init__(
        self,
        num_clips: int,
        clip_length: int,
        stride: int = 1,
        *,
        seed: int = 0,
        resolution: int = 64,
        flip: float = 0.0,
        segments: bool = False,
    ):
        self.num_clips, self.clip_length, self.stride, self.seed = num_clips, clip_length, stride, seed
        self.resolution, self.flip, self.segments = resolution, flip, segments

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, index)))
        states, goals = random_motion((self.clip_length - 1) * self.stride + 1, rng)
        states, goals = states[:: self.stride], goals[:: self.stride]
        render = partial(render_push_t, goal_pose=goals, resolution=self.resolution)
        clip = {"frames": render(states)}
        if self.segments:
            clip["segments"] = push_t_segments(states, render)
        return _flipped(clip, self.flip)


def _flipped(clip: dict[str, np.ndarray], probability: float) -> dict[str, np.ndarray]:
    """`clip`, mirrored with that probability."""
    if np.random.random() < probability:
        clip = {name: np.flip(value, axis=2) for name, value in clip.items()}
    return clip


def random_motion(num_frames: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """States [T, 5] and goal poses [T, 3] of our Push-T in which all three objects move smoothly at random.

    Each starts anywhere, at a speed of up to 12 px and 0.1 rad per frame, which changes a little from frame to frame,
    and turns back at the borders of the table. There are no forces: objects pass over each other.
    """
    start = random_states(1, rng)[0]
    poses = np.empty((3, num_frames, 3))
    ranges = (25.0, TABLE_SIZE - 25.0), (120.0, 390.0), (110.0, 400.0)  # agent, block, goal
    starts = (*start[:2], 0.0), start[2:5], (*rng.uniform(*ranges[2], 2), rng.uniform(0, 2 * np.pi))
    for pose, first, (low, high) in zip(poses, starts, ranges):
        direction, speed = rng.uniform(0, 2 * np.pi), rng.uniform(2.0, 12.0)
        velocity = np.array([speed * np.cos(direction), speed * np.sin(direction), rng.uniform(-0.1, 0.1)])
        change = rng.normal(0, [1.0, 1.0, 0.01], (num_frames - 1, 3)).cumsum(axis=0)
        pose[0] = first
        pose[1:] = first + (velocity + change).cumsum(axis=0)
        width = high - low
        pose[:, :2] = low + width - np.abs((pose[:, :2] - low) % (2 * width) - width)
    agent, block, goal = poses
    return np.concatenate([agent[:, :2], block], axis=1), goal


@dataclass
class ClipCollate:
    """Clips -> `{"pixel_values": float [B, T, 3, H, W]}`, with `"segments": int64 [B, T, H', W']` where there are any."""

    image_processor: Callable

    def __call__(self, clips: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
        frames = [clip["frames"] for clip in clips]
        batch = {"pixel_values": torch.as_tensor(self.image_processor(frames, return_tensors="pt")["pixel_values"])}
        if "segments" in clips[0]:
            batch["segments"] = torch.from_numpy(np.stack([clip["segments"] for clip in clips]))
        return batch


def open_clips(args: ClipTrainArguments):
    """Training and evaluation clips (None without a validation split)."""
    shape = (args.clip_length, args.frame_stride)
    if args.dataset is None:
        options = {"resolution": args.render_resolution}
        # no clip of one is a clip of the other, whatever the seeds
        return (
            RandomPushT(args.num_clips, *shape, seed=2 * args.seed, flip=args.flip_probability, **options),
            None
            if args.validation_split == "none"
            else RandomPushT(args.num_eval_clips, *shape, seed=2 * args.seed + 1, segments=True, **options),
        )
    splits = [args.train_split] + ([] if args.validation_split == "none" else [args.validation_split])
    try:
        videos = open_source(args.dataset, splits=splits, render_resolution=args.render_resolution).splits
    except ValueError as error:
        hint = " (--train_split and --validation_split name them; --validation_split none: no evaluation)"
        raise ValueError(f"{error}{hint if 'has no split' in str(error) else ''}") from error
    clips = VideoClips(videos[args.train_split], *shape, flip=args.flip_probability)
    if args.validation_split == "none":
        return clips, None
    return clips, VideoClips(videos[args.validation_split], *shape, segments=True)


def check_num_slots(num_slots: int, clips: VideoClips | RandomPushT | None) -> None:
    """Raises ValueError if the first clip has true masks, and of more objects than there are slots."""
    if clips is None or not clips.segments:
        return
    objects = len(np.setdiff1d(clips[0]["segments"], 0))
    if num_slots < objects:
        raise ValueError(
            f"num_slots={num_slots} is fewer than the {objects} objects of the first evaluation clip: give at least "
            f"{objects + 1}, one of them for the background"
        )


# --- objective and metrics -------------------------------------------------------------------------------------------


def clip_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's loss on a batch of clips and its terms, all outputs named `*_loss`."""
    output = model(batch["pixel_values"], return_loss=True)
    return output.loss, _terms(output)


def clip_metrics(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor | float]:
    """The losses with fixed seeds and, where true masks are known, the foreground ARI of the decoder's masks: of single
    frames, and of whole clips (`_clip`), where an object that changes its slot counts as split."""
    output = model(batch["pixel_values"], return_loss=True, seeds=list(range(len(batch["pixel_values"]))))
    metrics = {"loss": output.loss, **_terms(output)}
    if "segments" in batch:
        true = batch["segments"].cpu().numpy()  # [B, T, H, W]
        masks = F.interpolate(output.decoder_masks.flatten(0, 1).float(), size=true.shape[-2:], mode="bilinear")
        found = masks.argmax(dim=1).cpu().numpy().reshape(true.shape)
        for name, shape in (("", (-1, *true.shape[2:])), ("_clip", (len(true), -1, true.shape[3]))):
            metrics[f"foreground_ari{name}"] = foreground_ari(true.reshape(shape), found.reshape(shape))
    return metrics


def _terms(output) -> dict[str, Tensor]:
    return {name: value for name, value in output.items() if name.endswith("_loss")}


# --- from arguments to a trained folder ------------------------------------------------------------------------------


def train_on_clips(
    arguments_class: type[ClipTrainArguments],
    config_class: type,
    build: Callable[[Any, dict[str, Any]], tuple[nn.Module, Any, Any]],
    argv: Sequence[str] | None,
    description: str | None,
) -> TrainResult:
    """Trains as the command line says and leaves the model, with its image processor, in `--output_dir`.

    `build(args, overrides)` returns the model, the image processor that training uses, and the one that is saved.
    """
    args, fields = parse_arguments([arguments_class, config_arguments(config_class)], argv, description=description)
    overrides = config_overrides(fields)
    accelerator = make_accelerator(args)
    torch.manual_seed(args.seed)
    model, train_processor, saved_processor = build(args, overrides)
    with accelerator.main_process_first():
        clips, eval_clips = open_clips(args)
    check_num_slots(model.config.num_slots, eval_clips)

    def files(result):
        results = training_results(
            result,
            (p for p in model.parameters() if p.requires_grad),
            args.dataset or "Push-T, every object at random",
        )
        preprocessor = {"preprocessor_config.json": saved_processor.to_json_string()}
        return result_files(args, overrides, results) | preprocessor

    return train_and_save(
        model,
        clips,
        eval_clips,
        clip_loss,
        args,
        files,
        accelerator,
        metric_fn=clip_metrics,
        collate=ClipCollate(train_processor),
    )
