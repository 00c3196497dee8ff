"""Trains the slot encoder that follows objects, on videos: `cjepa-hf train crop-slots` and examples/train_crop_slots.py."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from ..data.video import Video, open_source
from ..models.crop_slots import CropSlotsConfig, CropSlotsImageProcessor, CropSlotsModel
from ..models.crop_slots.modeling_crop_slots import CropSlotsTracks
from .arguments import TrainArguments, config_arguments, config_overrides, parse_arguments
from .trainer import TrainResult, make_accelerator, result_files, train_and_save, training_results

_BACKGROUND_FRAMES = 500  # frames whose median is the background
_CALIBRATION_FRAMES = 2048  # frames that the scales of the slots are taken from
_SIDE_BY_SIDE = 16  # videos followed at once


@dataclass(kw_only=True)
class CropSlotsTrainArguments(TrainArguments):
    """Arguments of [`main`] beside the fields of [`CropSlotsConfig`]; the defaults train the collision world's encoder."""

    fixed_on_resume: ClassVar = (*TrainArguments.fixed_on_resume, "train_split", "num_videos", "frame_stride")

    # > Parameters that control the videos
    dataset: str = HfArg(
        default="",
        help="Videos of one static camera: whatever cjepa_hf.data.video opens, such as what `cjepa-hf collect collisions "
        "--frames 64` wrote.",
    )
    train_split: str = HfArg(default="train", help="Split to train on.")
    validation_split: str = HfArg(default="validation", help="Split to evaluate on; none: no evaluation.")
    num_videos: int = HfArg(default=1000, help="Videos to train on; their frames are held in memory, resized.")
    num_eval_videos: int = HfArg(default=40, help="Videos to evaluate on.")
    frame_stride: int = HfArg(default=4, help="Every so many-th frame is trained on; objects are followed in all.")

    max_steps: int = HfArg(default=6000, help="Optimizer steps.")
    batch_size: int = HfArg(
        default=16, help="Pairs of frames of a video per optimizer step, counted over all processes."
    )
    optimizer: Literal["adamw", "muon"] = HfArg(default="muon", help="muon: Muon for the matrices of the decoder.")
    learning_rate: float = HfArg(default=2e-3, help="Peak learning rate of AdamW.")
    muon_learning_rate: float = HfArg(default=4e-3, help="Peak learning rate of Muon.")
    weight_decay: float = HfArg(default=1e-4, help="Decoupled; not applied to biases and norms.")
    lr_floor: float = HfArg(default=0.01, help="Share of the peak learning rate that cosine ends at.")
    ema_decay: float = HfArg(default=0.998, help="Moving average of the weights, which is what is saved; 0: off.")

    def __post_init__(self):
        super().__post_init__()
        if not self.dataset:
            raise ValueError(
                "dataset is missing: collect videos with `cjepa-hf collect collisions --frames 64 --output-dir FOLDER` and "
                "pass --dataset FOLDER"
            )
        for name in ("num_videos", "num_eval_videos", "frame_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class FollowedFrames(torch.utils.data.Dataset):
    """Frames of videos in which objects were followed, fetched in pairs: a frame and another one of the same video, drawn
    at random, as `pixel_values` [B, 2, 3, H, W] with `centers` [B, 2, N, 2], `alive` and `born` [B, 2, N].

    Args:
        frames: uint8 [n, H, W, 3] of all videos after each other.
        videos: int64 [n], the number of each frame's video, ascending.
        tracks: of the frames, each [n, ...].
    """

    def __init__(self, frames: np.ndarray, videos: np.ndarray, tracks: CropSlotsTracks):
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames) == len(videos):
            raise ValueError(
                f"frames are {frames.dtype} {frames.shape} of {len(videos)} places; expected uint8 [n, H, W, 3]."
            )
        self.frames, self.videos, self.tracks = torch.from_numpy(frames), videos, tracks

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        indices = np.asarray(indices)
        first = np.searchsorted(self.videos, self.videos[indices], side="left")
        last = np.searchsorted(self.videos, self.videos[indices], side="right")
        pairs = torch.from_numpy(np.stack([indices, np.random.randint(first, last)], axis=1))
        pixel_values = self.frames[pairs].permute(0, 1, 4, 2, 3).float().div_(255)
        found = {name: self.tracks[name][pairs] for name in ("centers", "alive", "born")}
        return {"pixel_values": pixel_values, **found}

    @staticmethod
    def collate(samples: dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return samples if isinstance(samples, dict) else torch.utils.data.default_collate(samples)


def read_videos(videos: Sequence[Video], size: int) -> Iterable[np.ndarray]:
    """uint8 [T, size, size, 3] of each video, read by threads ahead of need. What is wrong with a video is raised."""
    processor = CropSlotsImageProcessor(size=size)

    def read(video):
        frames = video.frames()
        if frames.shape[1:] != (size, size, 3):
            frames = np.rint(processor(frames, return_tensors="np")["pixel_values"] * 255).astype(np.uint8)
            frames = frames.transpose(0, 2, 3, 1)
        return frames

    with ThreadPoolExecutor(4) as pool:
        for first in range(0, len(videos), _SIDE_BY_SIDE):
            yield from pool.map(read, videos[first : first + _SIDE_BY_SIDE])


def median_background(frames: np.ndarray) -> torch.Tensor:
    """The scene without objects, RGB in [0, 1], [3, H, W]: the median of uint8 frames [n, H, W, 3] of many videos."""
    return torch.from_numpy(np.median(frames, axis=0) / 255).float().permute(2, 0, 1)


def follow_videos(model: CropSlotsModel, videos: Sequence[Video], stride: int, *, progress: bool) -> FollowedFrames:
    """Follow the objects of videos and keep every `stride`-th frame. The model's background must be set."""
    kept, numbers, tracks = [], [], []

    def follow(clips):
        pixels = torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3).float().div_(255)
        found = model.follow(pixels.to(model.device))
        for k, clip in enumerate(clips):
            kept.append(clip[::stride])
            numbers.append(np.full(len(kept[-1]), len(kept)))
            tracks.append([found[name][k, ::stride].cpu() for name in ("centers", "alive", "born")])

    held: list[np.ndarray] = []
    for clip in tqdm(
        read_videos(videos, model.config.image_size),
        total=len(videos),
        desc="following objects",
        unit="video",
        disable=not progress,
    ):
        if held and (len(held) == _SIDE_BY_SIDE or held[0].shape != clip.shape):
            follow(held)
            held = []
        held.append(clip)
    follow(held)
    joined = CropSlotsTracks(*(torch.cat(x) for x in zip(*tracks)))
    return FollowedFrames(np.concatenate(kept), np.concatenate(numbers), joined)


def _loss(model, batch):
    tracks = CropSlotsTracks(centers=batch["centers"], alive=batch["alive"], born=batch["born"])
    output = model(batch["pixel_values"], tracks=tracks, return_loss=True)
    return output.loss, {name: output[name] for name in ("reconstruction_loss", "content_loss")}


def main(argv: Sequence[str] | None = None) -> TrainResult:
    """Trains as the command line `argv` (default: `sys.argv[1:]`) says and leaves the model in `--output_dir`, with its image
    processor, `training_args.json` and `training_results.json`."""
    args, fields = parse_arguments(
        [CropSlotsTrainArguments, config_arguments(CropSlotsConfig)], argv, description=__doc__
    )
    overrides = config_overrides(fields)
    accelerator = make_accelerator(args)
    torch.manual_seed(args.seed)
    model = CropSlotsModel(CropSlotsConfig(**overrides)).to(accelerator.device)
    size = model.config.image_size
    splits = [args.train_split] + ([] if args.validation_split == "none" else [args.validation_split])
    videos = open_source(args.dataset, splits=splits, render_resolution=size).splits
    train_videos = videos[args.train_split][: args.num_videos]
    # few frames of many videos: an object that rests covers its place in all frames of one
    sample = [train_videos[i] for i in np.unique(np.linspace(0, len(train_videos) - 1, 64).astype(int))]
    each = -(-_BACKGROUND_FRAMES // len(sample))
    chosen = [clip[np.linspace(0, len(clip) - 1, each).astype(int)] for clip in read_videos(sample, size)]
    model.set_background(median_background(np.concatenate(chosen)))
    progress = accelerator.is_main_process
    data = follow_videos(model, train_videos, args.frame_stride, progress=progress)
    if not data.tracks.alive.any():
        raise ValueError(
            f"no object was found in {len(train_videos)} videos of {args.dataset}: is object_radius="
            f"{model.config.object_radius} right for view_size={model.config.view_size}?"
        )
    eval_data = None
    if args.validation_split != "none":
        eval_videos = videos[args.validation_split][: args.num_eval_videos]
        eval_data = follow_videos(model, eval_videos, args.frame_stride, progress=progress)

    def files(result):
        chosen = np.unique(np.linspace(0, len(data) - 1, _CALIBRATION_FRAMES).astype(int))
        pixels = data.frames[chosen].permute(0, 3, 1, 2).float().div_(255)[:, None].to(model.device)
        tracks = (data.tracks[name][chosen][:, None].to(model.device) for name in ("centers", "alive", "born"))
        variances = model.calibrate(pixels, CropSlotsTracks(*tracks))
        results = training_results(result, model.parameters(), args.dataset, frames=len(data), **variances)
        preprocessor = {"preprocessor_config.json": CropSlotsImageProcessor(size=size).to_json_string()}
        return result_files(args, overrides, results) | preprocessor

    return train_and_save(model, data, eval_data, _loss, args, files, accelerator)


if __name__ == "__main__":
    main()
