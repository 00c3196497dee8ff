"""Trains the color-prototype slot encoder on frames: `cjepa-hf train color-isa` and examples/train_slot_encoder.py."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from transformers.hf_argparser import HfArg

from ..models.color_isa import ColorIsaConfig, ColorIsaImageProcessor, ColorIsaModel
from .arguments import TrainArguments, parse_arguments
from .trainer import TrainResult, create_hub_repository, make_accelerator, push_folder_to_hub, save_model_folder, train

_SCENE_FRAMES = 500  # frames that the empty scene and the colors are taken from
_CALIBRATION_FRAMES = 4096  # frames that the scale of the content is taken from


@dataclass(kw_only=True)
class ColorIsaTrainArguments(TrainArguments):
    """Arguments of [`main`]; the defaults train the Push-T encoder."""

    # > Parameters that control the frames
    dataset: str | None = HfArg(
        default=None,
        help="Folder or Hub id of a data set with a column of frames or images; default: frames of our Push-T.",
    )
    column: str | None = HfArg(default=None, help="That column; default: the first of frames, images, image, pixels.")
    num_frames: int = HfArg(default=40_000, help="Frames to train on; all are held in memory, resized.")
    num_eval_frames: int = HfArg(default=2_000, help="Frames to evaluate on.")
    style: Literal["mixture", "smooth", "aliased"] = HfArg(
        default="mixture", help="How our Push-T is drawn: anti-aliased, as the peers' frames, or half of each."
    )

    # > Parameters that control the model
    num_slots: int = HfArg(default=4, help="Slots, the background included: one more than there are colored objects.")
    slot_size: int = HfArg(default=64, help="Size of a slot.")
    content_noise: float = HfArg(default=0.1, help="Noise on the content that the decoder has to live with.")
    content_loss_weight: float = HfArg(default=3e-5, help="Weight of the squared content.")
    max_offset: float = HfArg(default=0.3, help="Largest offset of a slot from its attention's centroid; 0: none.")

    max_steps: int = HfArg(default=4000, help="Optimizer steps.")
    batch_size: int = HfArg(default=32, help="Frames per optimizer step, counted over all processes.")
    optimizer: Literal["adamw", "muon"] = HfArg(default="muon", help="muon: Muon for the matrices of the layers.")
    learning_rate: float = HfArg(default=1e-3, help="Peak learning rate of AdamW.")
    muon_learning_rate: float = HfArg(default=4e-3, help="Peak learning rate of Muon.")
    weight_decay: float = HfArg(default=1e-4, help="Decoupled; not applied to biases and norms.")
    ema_decay: float = HfArg(default=0.998, help="Moving average of the weights, which is what is saved; 0: off.")

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_frames", "num_eval_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class FrameDataset(torch.utils.data.Dataset):
    """uint8 frames [n, H, W, 3], fetched as batches of float `pixel_values` [B, 3, H, W] in [0, 1].

    `targets` [m, H, W, 3], m <= n: the first m scenes as they are to be drawn, where that is not as they are seen;
    batches then also have `target_pixel_values`.
    """

    def __init__(self, frames: np.ndarray, targets: np.ndarray | None = None):
        for array in (frames,) if targets is None else (frames, targets):
            if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or len(array) == 0:
                raise ValueError(
                    f"frames are {array.dtype} of shape {array.shape}; expected uint8 [n, H, W, 3], n > 0."
                )
        if targets is not None and (len(targets) > len(frames) or targets.shape[1:] != frames.shape[1:]):
            raise ValueError(f"targets of shape {targets.shape} do not fit frames of shape {frames.shape}.")
        self.frames = torch.from_numpy(frames)
        self.targets = None if targets is None else torch.from_numpy(targets)

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """uint8 [B, 1 or 2, H, W, 3]: as seen, and as to be drawn."""
        indices = torch.as_tensor(indices)
        seen = self.frames[indices]
        if self.targets is None:
            return seen[:, None]
        drawn, other = seen.clone(), indices < len(self.targets)
        drawn[other] = self.targets[indices[other]]
        return torch.stack([seen, drawn], dim=1)

    @staticmethod
    def collate(frames) -> dict[str, torch.Tensor]:
        if not isinstance(frames, torch.Tensor):
            frames = torch.stack(frames)
        frames = frames.permute(1, 0, 4, 2, 3).float().div_(255)
        return dict(zip(("pixel_values", "target_pixel_values"), frames))


def main(argv: Sequence[str] | None = None) -> TrainResult:
    """Trains as the command line `argv` (default: `sys.argv[1:]`) says and leaves the model in `--output_dir`.

    The folder is ready for `from_pretrained`; it also gets the image processor, training_args.json and
    latent_statistics.json (mean and standard deviation of every slot, variance of positions and contents).
    """
    (args,) = parse_arguments(ColorIsaTrainArguments, argv, description=__doc__)
    config = ColorIsaConfig(
        num_slots=args.num_slots,
        slot_size=args.slot_size,
        content_noise=args.content_noise,
        content_loss_weight=args.content_loss_weight,
        max_offset=args.max_offset,
    )
    accelerator = make_accelerator(args)
    if args.push_to_hub and accelerator.is_main_process:
        create_hub_repository(args)
    if args.dataset is None:
        data = push_t_frames(args, config.image_size)
    else:
        data = tuple(FrameDataset(frames) for frames in dataset_frames(args, config.image_size))
    _, result = train_slot_encoder(config, *data, args, accelerator)
    if args.push_to_hub and accelerator.is_main_process:
        print(push_folder_to_hub(args))
    return result


def train_slot_encoder(
    config: ColorIsaConfig,
    dataset: FrameDataset,
    eval_dataset: FrameDataset | None,
    args: ColorIsaTrainArguments,
    accelerator=None,
) -> tuple[ColorIsaModel, TrainResult]:
    """Trains on frames alone and saves the model in `args.output_dir`.

    Resumes as [`~cjepa_hf.training.trainer.train`] does; raises what that raises.
    """
    accelerator = accelerator or make_accelerator(args)
    torch.manual_seed(args.seed)
    model = ColorIsaModel(config)
    model.set_scene(*scene_statistics(dataset.frames.numpy(), config.num_slots, args.seed))
    result = train(model, dataset, eval_dataset, _loss, args, accelerator=accelerator)
    statistics = calibrate_content(model, dataset)
    if accelerator.is_main_process:
        files = {
            "training_args.json": json.dumps(asdict(args), indent=2),
            "latent_statistics.json": json.dumps(statistics, indent=2),
            "preprocessor_config.json": ColorIsaImageProcessor(size=config.image_size).to_json_string(),
        }
        save_model_folder(model, args.output_dir, files)
    accelerator.wait_for_everyone()
    return model, result


def _loss(model, batch):
    output = model(**batch, return_loss=True)
    names = ("reconstruction_loss", "color_loss", "content_loss")
    return output.loss, {name: output[name] for name in names}


def scene_statistics(frames: np.ndarray, num_slots: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Colors of the slots [num_slots, 3] and the empty scene [3, H, W], RGB in [0, 1], from uint8 frames [n, H, W, 3].

    The empty scene is the median over time. Colors: k-means with medians on pixels, started from the most frequent
    color and then, again and again, from the pixels furthest from all colors so far. The first is the background; the
    others are sorted from the most to the least saturated, so that slots keep their order over seeds.
    """
    rng = np.random.default_rng(seed)
    sample = frames[rng.permutation(len(frames))[:_SCENE_FRAMES]]
    background = np.median(sample, axis=0) / 255
    pixels = sample.reshape(-1, 3)
    pixels = pixels[rng.permutation(len(pixels))[:200_000]]
    values, counts = np.unique(pixels, axis=0, return_counts=True)
    pixels = pixels / 255
    colors = [values[counts.argmax()] / 255]
    for _ in range(num_slots - 1):
        distance = np.min([np.square(pixels - color).sum(axis=1) for color in colors], axis=0)
        furthest = distance.argsort()[-max(len(pixels) // 400, 1) :]
        colors.append(np.median(pixels[furthest], axis=0))
    colors = np.array(colors)
    for _ in range(10):
        nearest = np.argmin([np.square(pixels - color).sum(axis=1) for color in colors], axis=0)
        colors = np.array(
            [np.median(pixels[nearest == k], axis=0) if (nearest == k).any() else c for k, c in enumerate(colors)]
        )
    saturation = 1 - colors.min(axis=1) / colors.max(axis=1).clip(1e-6)
    order = [0, *(1 + np.argsort(-saturation[1:], kind="stable"))]
    return torch.from_numpy(colors[order]).float(), torch.from_numpy(background.transpose(2, 0, 1)).float()


@torch.no_grad()
def calibrate_content(model: ColorIsaModel, dataset: FrameDataset) -> dict:
    """Scales the content so that the object whose content varies most has variance `config.content_variance`, against
    positions scaled by `config.position_scale`; returns statistics of the resulting slots, as lists by slot."""
    indices = np.linspace(0, len(dataset) - 1, min(len(dataset), _CALIBRATION_FRAMES)).astype(int)
    pixel_values = dataset.collate(dataset.__getitems__(indices))["pixel_values"].to(model.device)
    model.set_content_scale(1.0)
    position, content = model.split_slots(model(pixel_values).slots)
    variance = content.var(dim=0).sum(dim=-1)
    largest = variance[1:].max().item()
    # a content that never varies has nothing to weigh
    model.set_content_scale((model.config.content_variance / largest) ** 0.5 if largest > 1e-8 else 1.0)
    slots = model(pixel_values).slots
    return {
        "frames": len(indices),
        "content_scale": model.content_scale.item(),
        "position_variance": (position.var(dim=0).sum(dim=-1) * model.config.position_scale**2).tolist(),
        "content_variance": (variance * model.content_scale**2).tolist(),
        "mean": slots.mean(dim=0).tolist(),
        "std": slots.std(dim=0).tolist(),
    }


def push_t_frames(args: ColorIsaTrainArguments, resolution: int) -> tuple[FrameDataset, FrameDataset]:
    """Training and evaluation frames of our Push-T, a function of the seed. Aliased frames are to be drawn smooth."""
    from ..data.collect import sample_encoder_frames
    from ..simulators.rendering import render_push_t

    def draw(count, seed):
        aliased = {"mixture": count // 2, "smooth": 0, "aliased": count}[args.style]
        smooth, states, goals = sample_encoder_frames(count, seed=seed, resolution=resolution)
        if aliased == 0:
            return FrameDataset(smooth)
        seen = smooth.copy()
        seen[:aliased] = render_push_t(
            states[:aliased], goal_pose=goals[:aliased], resolution=resolution, style="aliased"
        )
        return FrameDataset(seen, smooth[:aliased])

    # evaluation frames never share a seed with training frames
    return draw(args.num_frames, 2 * args.seed), draw(args.num_eval_frames, 2 * args.seed + 1)


def dataset_frames(args: ColorIsaTrainArguments, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames of a data set's train split and of its validation split (without one: the last frames of train).

    The column holds images, encoded images, or clips of frames; frames are taken evenly over the rows and all of a clip.
    """
    from datasets import get_dataset_split_names

    from ..data.slots import load_split

    splits = {name: load_split(args.dataset, name) for name in get_dataset_split_names(args.dataset)}
    if "train" not in splits:
        raise ValueError(f"{args.dataset} has splits {list(splits)}; expected one named train.")
    processor = ColorIsaImageProcessor(size=resolution)

    def read(split, count):
        names = [args.column] if args.column else ["frames", "images", "image", "pixels"]
        name = next((name for name in names if name in split.column_names), None)
        if name is None:
            raise ValueError(
                f"{args.dataset} has columns {split.column_names}; expected frames in {' or '.join(names)}. Name the "
                "column with --column."
            )
        per_row = -(-count // len(split))
        rows = np.unique(np.linspace(0, len(split) - 1, min(count, len(split))).astype(int))
        split, frames = split.select_columns([name]).with_format("numpy"), []
        for row in rows.tolist():
            clip = split[row][name]
            if clip.ndim == 3:
                clip = clip[None]
            wanted = min(per_row, len(clip))
            # shifted from row to row: few frames of each would otherwise all be the first ones, before anything moves
            chosen = ((np.arange(wanted) + row * 0.6180339887498949 % 1) * (len(clip) / max(wanted, 1))).astype(int)
            images = [_bytes_or_floats(clip[i], f"{args.dataset}, column {name!r}, row {row}") for i in chosen]
            if images:
                pixels = processor(images, return_tensors="np")["pixel_values"]
                frames.append(np.rint(pixels * 255).astype(np.uint8).transpose(0, 2, 3, 1))
        if not frames:
            raise ValueError(f"{args.dataset} has no frame in column {name!r}: every row is empty.")
        return np.concatenate(frames)[:count]

    if "validation" in splits:
        return read(splits["train"], args.num_frames), read(splits["validation"], args.num_eval_frames)
    rows = splits["train"]
    held_out = max(len(rows) // 20, 1)
    if len(rows) < 2:
        raise ValueError(f"{args.dataset} has one row and no validation split: give at least two rows.")
    return (
        read(rows.select(range(len(rows) - held_out)), args.num_frames),
        read(rows.select(range(len(rows) - held_out, len(rows))), args.num_eval_frames),
    )


def _bytes_or_floats(image: np.ndarray, place: str) -> np.ndarray:
    """`image` with integers as uint8 (the numpy format of `datasets` widens them); others as they are."""
    if not np.issubdtype(image.dtype, np.integer):
        return image
    if image.size and not (image.min() >= 0 and image.max() <= 255):
        raise ValueError(f"{place}: numbers from {image.min()} to {image.max()}; expected 0 to 255.")
    return image.astype(np.uint8)


if __name__ == "__main__":
    main()
