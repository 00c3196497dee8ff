"""Trains a C-JEPA world model on a slot dataset: `cjepa-hf train` and `examples/train.py`.

The published objective (paper section 3.3) with what small budgets need beside it: histories of mixed length, so that
a plan can start from one frame, and noise on the observed slots.
"""

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, BaseImageProcessor
from transformers.hf_argparser import HfArg

from ..data.extract import weights_hash
from ..data.slots import (
    SlotDataset,
    SlotWindows,
    StreamingSlotWindows,
    frame_columns,
    load_slot_dataset,
    window_statistics,
)
from ..models.cjepa import CJepaModel, SlotWorldModel
from .arguments import TrainArguments, config_arguments, config_overrides, parse_arguments
from .trainer import (
    TrainResult,
    bare,
    card_text,
    make_accelerator,
    result_files,
    steps_taken,
    train_and_save,
    training_results,
)


@dataclass(kw_only=True)
class CJepaTrainArguments(TrainArguments):
    """Arguments of the world-model training beside [`TrainArguments`] and the model's own fields."""

    fixed_on_resume: ClassVar = (
        *TrainArguments.fixed_on_resume,
        "train_split",
        "init_model",
        "history_crop_probability",
        "shortest_history",
        "contact_share",
        "turn_share",
        "hold_absent",
        "mask_present",
        "slot_noise",
        "rollout_weight",
        "rollout_steps",
    )

    # > Parameters that control the data
    dataset: str = HfArg(help="Slot dataset: a folder, or the id of a dataset repository on the Hub.")
    dataset_revision: str | None = HfArg(default=None, help="Branch, tag or commit of a dataset on the Hub.")
    train_split: str = HfArg(default="train", help="Split to train on; the statistics come from it alone.")
    validation_split: str = HfArg(default="validation", help="Split to evaluate on; none: no evaluation.")
    streaming: bool = HfArg(default=False, help="Read the training split as it comes instead of downloading it.")
    shuffle_buffer: int = HfArg(default=10_000, help="Windows that a streamed dataset is shuffled among.")

    # > Parameters that control the objective
    history_crop_probability: float = HfArg(
        default=0.0,
        help="Share of the batches whose history is cut to its last shortest_history ... history_length - 1 frames "
        "(uniform), so that the model also predicts from short histories.",
    )
    shortest_history: int = HfArg(default=1, help="Frames that a cut history keeps at least.")
    contact_share: float = HfArg(
        default=0.0,
        help="Share of the windows in whose predicted part a contact begins, brought about by repeating them; 0: as they "
        "come. Needs the column contacts.",
    )
    turn_share: float = HfArg(
        default=0.0,
        help="Where contacts are not known: share of the windows in whose predicted part an object leaves its straight path, "
        "brought about by repeating them, the tenth of all that leaves it furthest; 0: as they come. By the positions that "
        "the slot encoder tells, else by whole slots.",
    )
    hold_absent: bool = HfArg(
        default=False,
        help="What is empty in the last observed frame stays so in the target: who will enter cannot be told from the "
        "slots. Needs a dataset that says what an empty slot looks like (its encoder's empty_slot).",
    )
    mask_present: bool = HfArg(
        default=False,
        help="Hide only objects that are there in all frames of the visible prefix, moving or not. Needs such a dataset, "
        "and mask_static_slots false.",
    )
    slot_noise: float = HfArg(default=0.0, help="Standard deviation of noise on the observed slots (slot units).")
    rollout_weight: float = HfArg(
        default=0.0,
        help="Weight of the rollout loss: the model imagines frames, feeding its own predictions back as a plan does, and "
        "the error of them all is added. The published objective has none; a few steps of it at the end of a training make "
        "long rollouts better.",
    )
    rollout_steps: int = HfArg(
        default=0,
        help="Frames that the rollout loss imagines after the history of a batch. 0: all frames of a window after its "
        "first.",
    )
    eval_rollout_steps: int = HfArg(default=5, help="Frames that the evaluation imagines.")
    proprio_learning_rate: float | None = HfArg(
        default=None,
        help="AdamW learning rate of the proprioception embedding (the paper: 1e-4); None: the common one.",
    )

    # > Parameters that control the model
    init_model: str | None = HfArg(
        default=None, help="World model (folder or Hub id) whose weights training starts from."
    )
    slot_encoder: str | None = HfArg(
        default=None,
        help="Slot encoder (folder or Hub id) that made the slots: it is put, frozen, into the trained model, which "
        "then plans from pixels.",
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.history_crop_probability <= 1:
            raise ValueError(f"history_crop_probability must be in [0, 1], got {self.history_crop_probability!r}")
        if not self.slot_noise >= 0:
            raise ValueError(f"slot_noise must be at least 0, got {self.slot_noise!r}")
        if not self.rollout_weight >= 0:
            raise ValueError(f"rollout_weight must be at least 0, got {self.rollout_weight!r}")
        if self.rollout_steps < 0:
            raise ValueError(f"rollout_steps must be at least 0, got {self.rollout_steps!r}")
        for name in ("contact_share", "turn_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")
        if self.contact_share and self.turn_share:
            raise ValueError("give contact_share where contacts are known, else turn_share, not both")
        if self.shortest_history < 1:
            raise ValueError(f"shortest_history must be at least 1, got {self.shortest_history!r}")
        if self.eval_rollout_steps < 1:
            raise ValueError(f"eval_rollout_steps must be at least 1, got {self.eval_rollout_steps!r}")


# --- objective and metrics -----------------------------------------------------------------------------------------


_EMPTY_TOLERANCE = 0.05  # root mean square distance, slot units


def contact_order(windows: SlotWindows, history_length: int, share: float) -> np.ndarray:
    """
    Indices int64 of all windows, those in whose predicted part a contact begins repeated until they are `share` of all.

    Raises `ValueError` without the column `contacts`, and where no window has one.
    """
    dataset, skip = windows.dataset, windows.frame_skip
    if "contacts" not in dataset.columns:
        raise ValueError(f"contact_share needs the column contacts; {dataset.name} has {dataset.columns}")
    column = frame_columns(dataset.data, ["contacts"])["contacts"]
    low, high = (history_length - 1) * skip, (windows.steps - 1) * skip
    found, first = [], 0
    for chunk, start, length in zip(column.chunk, column.first, column.length):
        count = max(int(length) - windows.steps * skip + 1, 0)
        begun = np.concatenate([[0], column.frames[chunk][start : start + length].any(axis=1).cumsum()])
        place = np.arange(count)
        found.append(first + place[begun[place + high] > begun[place + low]])
        first += count
    found = np.concatenate(found)
    if not len(found):
        raise ValueError(f"contact_share: no contact begins in the predicted part of any window of {dataset.name}")
    return _with_repeated(found, first, share)


@torch.no_grad()
def turn_order(
    windows: SlotWindows,
    history_length: int,
    share: float,
    *,
    positions: Callable[[Tensor], Tensor] | None = None,
    empty_slot: Tensor | None = None,
) -> np.ndarray:
    """
    Indices int64 of all windows, the tenth in whose predicted part an object leaves its straight path furthest repeated
    until they are `share` of all: where contacts are not known, those are the windows that tell of them.

    `positions` tells places [..., N, 2] of slots [..., N, D]; without, whole slots stand for them. A slot that is
    `empty_slot` [D] in a frame has no path there.
    """
    dataset, skip = windows.dataset, windows.frame_skip
    column = frame_columns(dataset.data, ["slots"])["slots"]
    last = (history_length - 1) * skip
    turns = []
    for chunk, start, length in zip(column.chunk, column.first, column.length):
        slots = torch.from_numpy(np.array(column.frames[chunk][start : start + length], dtype=np.float32))
        there = torch.ones(slots.shape[:2], dtype=torch.bool)
        if empty_slot is not None:
            there = (slots - empty_slot.cpu()).square().mean(-1) > _EMPTY_TOLERANCE**2
        place = slots if positions is None else positions(slots).cpu()
        now = last + torch.arange(max(int(length) - windows.steps * skip + 1, 0))
        velocity, seen = place[now] - place[now - skip], there[now] & there[now - skip]
        furthest = torch.zeros(len(now))
        for k in range(1, windows.steps - history_length + 1):
            off = (place[now + k * skip] - place[now] - k * velocity).square().sum(-1).sqrt()  # [windows, N]
            furthest = torch.maximum(furthest, off.where(seen & there[now + k * skip], 0.0).amax(dim=1))
        turns.append(furthest.numpy())
    turns = np.concatenate(turns)
    return _with_repeated(np.flatnonzero(turns > np.quantile(turns, 0.9)), len(turns), share)


def _with_repeated(found: np.ndarray, count: int, share: float) -> np.ndarray:
    """All indices below `count`, those `found` repeated until they are `share` of what is returned."""
    missing = round(share / (1 - share) * (count - len(found))) - len(found) if len(found) else 0
    return np.concatenate([np.arange(count), np.resize(found, max(missing, 0))])


def world_model_loss(
    model: SlotWorldModel,
    args: CJepaTrainArguments,
    statistics: Mapping[str, Tensor],
    empty_slot: Tensor | None = None,
) -> Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]:
    """The loss function of a batch of windows {"slots" [B, W, N, D], "actions", "proprio"} in raw units, W frames of which
    the first history_length are observed and the next prediction_length, or rollout_steps, are predicted.

    `empty_slot` [D] is what a slot without object looks like. A batch may carry its own `slot_mask` ([B, N] or
    [B, T_h, N], True = hidden); by default the model draws one per sample, from the slots before noise (noise would make
    a static slot move).
    """
    config = model.config
    length = config.history_length
    if (args.hold_absent or args.mask_present) and empty_slot is None:
        raise ValueError("hold_absent and mask_present need a dataset whose encoder has an empty_slot, or to be false")
    if args.mask_present and config.mask_static_slots:
        raise ValueError(
            "mask_present chooses what may be hidden, mask_static_slots true hides anything: set it to false"
        )

    # an autoregressive model's loss reads everything
    spared = {"trained_only": True} if isinstance(model, CJepaModel) else {}

    def loss_fn(wrapped: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = SlotWindows.normalize(batch, statistics)
        slots, actions, proprio = (batch.get(name) for name in ("slots", "actions", "proprio"))
        # Python's generator is the same on every process: all cut alike
        crop = length > 1 and wrapped.training and random.random() < args.history_crop_probability
        first = length - random.randint(min(args.shortest_history, length - 1), length - 1) if crop else 0
        history, future = slots[:, first:length], slots[:, length:]
        there = None
        if args.hold_absent or args.mask_present:
            there = (history - empty_slot).square().mean(-1) > _EMPTY_TOLERANCE**2  # [B, T, N]
        if args.hold_absent:
            future = torch.where(there[:, -1:, :, None], future, history[:, -1:])
        mask = batch.get("slot_mask")
        if mask is not None and mask.ndim == 3:
            mask = mask[:, first:]
        hides = config.masked_slots_range[1] > 0 and length - first > config.visible_prefix
        if mask is None and wrapped.training and hides:
            moving = None
            if args.mask_present:
                moving = there[:, : config.visible_prefix].all(dim=1)
            elif not config.mask_static_slots:  # judged by the whole window, more than the model sees
                change = (slots - slots[:, :1]).square().mean(-1).sqrt().amax(dim=1)
                moving = change > config.static_slot_tolerance
            mask = model.draw_slot_mask(history, moving=moving)
        if args.slot_noise and wrapped.training:
            history = history + args.slot_noise * torch.randn_like(history)
        output = wrapped(
            history,
            actions=None if actions is None else actions[:, first:length],
            proprio=None if proprio is None else proprio[:, first:length],
            future_slots=future[:, : config.prediction_length],
            future_proprio=None if proprio is None else proprio[:, length : length + config.prediction_length],
            slot_mask=mask,
            **spared,
        )
        loss = output.loss
        terms = {name: getattr(output, name) for name in ("future_loss", "history_loss", "proprio_loss")}
        if args.rollout_weight and wrapped.training:
            if args.rollout_steps:
                if future.shape[1] < args.rollout_steps:
                    raise ValueError(
                        f"windows of {slots.shape[1]} frames: rollout_steps={args.rollout_steps} after a history of {length} "
                        f"needs {length + args.rollout_steps}"
                    )
                observed, target = (first, length), future[:, : args.rollout_steps]
            else:
                observed, target = (0, 1), slots[:, 1 : length + config.prediction_length]
                history = slots[:, :1] + args.slot_noise * torch.randn_like(slots[:, :1])
            terms["rollout_loss"] = rollout_loss(bare(wrapped), history, target, observed, actions, proprio)
            loss = loss + args.rollout_weight * terms["rollout_loss"]
        return loss, {name: value.detach() for name, value in terms.items() if value is not None}

    def rollout_loss(
        model: SlotWorldModel,
        history: Tensor,
        target: Tensor,
        observed: tuple[int, int],
        actions: Tensor | None,
        proprio: Tensor | None,
    ) -> Tensor:
        """From `history` [B, T, N, D], the frames `observed` (first, end) of the window, to the `target` after them."""
        first, end = observed
        imagined = model.rollout(
            history,
            actions=None if actions is None else actions[:, first : end + target.shape[1] - 1],
            proprio=None if proprio is None else proprio[:, first:end],
            num_steps=target.shape[1],
        ).slots
        return model.token_loss(imagined, target).mean()

    return loss_fn


def world_model_metrics(
    model: SlotWorldModel, steps: int, statistics: Mapping[str, Tensor]
) -> Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]:
    """Open-loop errors on windows of history_length + `steps` frames; all imagine the same frames.

    `mse_k`: mean squared slot error of the k-th imagined frame when a rollout starts from 1 frame, for k = 1 and
    `steps`; `mse_k_history`: from history_length frames; `copy_mse_k`: of repeating the last observed frame.
    """
    length = model.config.history_length

    def metric_fn(model: SlotWorldModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = SlotWindows.normalize(batch, statistics)
        slots, actions, proprio = (batch.get(name) for name in ("slots", "actions", "proprio"))
        target = slots[:, length:]
        results = {}
        starts = {"": length - 1, "_history": 0} if length > 1 else {"": 0}
        for name, first in starts.items():
            imagined = model.rollout(
                slots[:, first:length],
                actions=None if actions is None else actions[:, first : length + steps - 1],
                proprio=None if proprio is None else proprio[:, first:length],
                num_steps=steps,
            ).slots
            error = (imagined.float() - target).square().mean(dim=(0, 2, 3))
            results |= {f"mse_1{name}": error[0], f"mse_{steps}{name}": error[-1]}
        error = (slots[:, length - 1 : length] - target).square().mean(dim=(0, 2, 3))
        return results | {"copy_mse_1": error[0], f"copy_mse_{steps}": error[-1]}

    return metric_fn


# --- from arguments to a trained folder ----------------------------------------------------------------------------


def build_model(
    args: CJepaTrainArguments,
    overrides: Mapping[str, Any],
    dataset: SlotDataset,
    model_class: type[SlotWorldModel] = CJepaModel,
) -> tuple[SlotWorldModel, BaseImageProcessor | None]:
    """The model to train, sized by the dataset, with the slot encoder in it, and that encoder's image processor.

    Raises `ValueError` where the configuration, the dataset and the encoder contradict each other.
    """
    config_class = model_class.config_class
    values: dict[str, Any] = {}
    if args.init_model:
        config = config_class.from_pretrained(args.init_model)
        names = config_class.__annotations__.keys() - {"model_type"}
        values = {name: getattr(config, name) for name in names}
    elif dataset.frame_skip:
        values["frame_skip"] = dataset.frame_skip
    values |= overrides
    frame_skip = values.get("frame_skip", config_class.frame_skip)
    features = dataset.data.features
    widths = {name: features[name].shape[1] for name in ("actions", "proprio") if name in dataset.columns}
    sizes = {
        "num_slots": dataset.num_slots,
        "slot_size": dataset.slot_size,
        "action_size": widths.get("actions", 0) * frame_skip,
        "proprio_size": widths.get("proprio", 0),
    }
    for name, size in sizes.items():
        given = values.setdefault(name, size)
        if given != size and not (given == 0 and name in ("action_size", "proprio_size")):
            raise ValueError(f"{name}={given}, but {dataset.name} has {size} (frame_skip {frame_skip})")
    encoder = None
    if args.slot_encoder:
        encoder = AutoModel.from_pretrained(args.slot_encoder, use_safetensors=True, dtype=torch.float32)
        for name in ("num_slots", "slot_size"):
            if getattr(encoder.config, name, sizes[name]) != sizes[name]:
                raise ValueError(
                    f"the slot encoder {args.slot_encoder} has {name}={getattr(encoder.config, name)}, {dataset.name} "
                    f"has {sizes[name]}: pass the encoder that made the dataset"
                )
        values["slot_encoder_config"] = encoder.config
    config = config_class(**values)
    if args.init_model:
        model, report = model_class.from_pretrained(
            args.init_model, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        given = "slot_encoder." if encoder is not None else ()  # its weights come from elsewhere
        missing = sorted(name for name in report["missing_keys"] if not name.startswith(given))
        # parts that the overrides add start fresh, but no encoder does: it is not trained
        if missing and (not overrides or any(name.startswith("slot_encoder.") for name in missing)):
            raise ValueError(
                f"the weights of {args.init_model} lack {len(missing)} tensors of the model, {missing[0]} first: give a "
                "folder whose config.json and weights were saved together"
            )
    else:
        model = model_class(config)
    if encoder is not None:
        model.slot_encoder = encoder
    if model.slot_encoder is None:
        return model, None
    place = args.slot_encoder or args.init_model
    made_by = (dataset.metadata.get("encoder") or {}).get("weights_hash")
    if made_by not in (None, weights_hash(model.slot_encoder)):
        raise ValueError(
            f"the slots of {dataset.name} were made by an encoder with other weights than that of {place}: pass the "
            f"one that made them as --slot_encoder, or extract the dataset again"
        )
    model.slot_encoder.requires_grad_(False)
    return model, AutoImageProcessor.from_pretrained(place)


def main(argv: Sequence[str] | None = None) -> TrainResult:
    """Trains as the command line `argv` (default: `sys.argv[1:]`) says and leaves the model in `--output_dir`."""
    return train_world_model(CJepaModel, argv, __doc__)


def train_world_model(
    model_class: type[SlotWorldModel], argv: Sequence[str] | None, description: str | None
) -> TrainResult:
    """[`main`] for any world model of slots; the fields of its configuration are arguments too."""
    classes = [CJepaTrainArguments, config_arguments(model_class.config_class)]
    args, given = parse_arguments(classes, argv, description=description)
    overrides = config_overrides(given)
    accelerator = make_accelerator(args, find_unused_parameters=_may_leave_parameters_unused(args, overrides))
    with accelerator.main_process_first():  # the first process prepares the memory-mapped files
        train_slots = load_slot_dataset(
            args.dataset, args.train_split, revision=args.dataset_revision, streaming=args.streaming
        )
        validation = None
        if args.validation_split != "none":
            validation = load_slot_dataset(args.dataset, args.validation_split, revision=args.dataset_revision)
    torch.manual_seed(args.seed)
    model, processor = build_model(args, overrides, train_slots, model_class)
    config = model.config
    columns = ["slots"]
    columns += ["actions"] if config.action_size else []
    columns += ["proprio"] if config.proprio_size else []
    predicted = max(config.prediction_length, args.rollout_steps if args.rollout_weight else 0)
    shape = (config.history_length, predicted, config.frame_skip)
    if args.streaming:
        windows = StreamingSlotWindows(
            train_slots, *shape, columns=columns, shuffle_buffer=args.shuffle_buffer, seed=args.seed
        )
    else:
        windows = SlotWindows(train_slots, *shape, columns=columns)
    statistics = _statistics(model, train_slots, shape)
    steps, eval_windows = args.eval_rollout_steps, None
    if validation is not None:
        longest = int(validation.lengths.max()) // config.frame_skip - config.history_length
        if longest < steps:
            print(f"validation episodes allow rollouts of {longest} frames, not {steps}", file=sys.stderr)
            steps = max(1, longest)
        eval_windows = SlotWindows(validation, config.history_length, steps, config.frame_skip, columns=columns)
    on_device = {name: value.to(accelerator.device) for name, value in statistics.items()}
    empty = (train_slots.metadata.get("encoder") or {}).get("empty_slot")
    empty = None if empty is None else torch.tensor(empty, device=accelerator.device)
    data: Any = windows
    if args.contact_share or args.turn_share:
        if args.streaming:
            raise ValueError("contact_share and turn_share need an indexable dataset: leave out streaming")
        if args.contact_share:
            order = contact_order(windows, config.history_length, args.contact_share)
        else:
            positions = getattr(model.slot_encoder, "positions", None)
            order = turn_order(windows, config.history_length, args.turn_share, positions=positions, empty_slot=empty)
        data = torch.utils.data.Subset(windows, order)
    rates = {"proprio_embedding": args.proprio_learning_rate} if args.proprio_learning_rate else None
    return train_and_save(
        model,
        data,
        eval_windows,
        world_model_loss(model, args, on_device, empty),
        args,
        lambda result: _files(model, processor, args, overrides, train_slots, statistics, result),
        accelerator,
        collate=windows.collate if data is not windows else None,
        metric_fn=world_model_metrics(model, steps, on_device),
        learning_rates=rates,
    )


def _may_leave_parameters_unused(args: CJepaTrainArguments, overrides: Mapping[str, Any]) -> bool:
    """A velocity needs two frames: cropped to one, its gains are not used. (With init_model the field may come from
    there, and to look for unused parameters in vain costs little.)"""
    velocity = overrides.get("residual_prediction") == "velocity" or bool(args.init_model)
    return bool(args.history_crop_probability) and velocity


def _statistics(model: SlotWorldModel, dataset: SlotDataset, shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """Those the model was trained with where it has any (its weights expect them), else of the training split; the
    model keeps them."""
    statistics = {name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers(recurse=False)}
    if any(not torch.isfinite(value).all() for value in statistics.values()):
        found = window_statistics(dataset, *shape)
        statistics = {name: torch.tensor(found[name], dtype=torch.float32) for name in statistics}
        model.set_statistics(**statistics)
    return statistics


def _files(model, processor, args, overrides, dataset, statistics, result) -> dict[str, str]:
    results = training_results(
        result,
        (p for name, p in model.named_parameters() if not name.startswith("slot_encoder.")),
        args.dataset,
        dataset_revision=args.dataset_revision,
        slot_encoder=dataset.metadata.get("encoder"),
        statistics={name: value.tolist() for name, value in statistics.items()},
    )
    files = result_files(args, overrides, results) | {"README.md": model_card(model, args, results)}
    if processor is not None:
        files["preprocessor_config.json"] = processor.to_json_string()
    return files


def model_card(model: SlotWorldModel, args: CJepaTrainArguments, results: Mapping[str, Any]) -> str:
    """README.md of a trained folder: what it is, how it was trained, what was measured."""
    config = model.config
    kind, what = "c-jepa", "A C-JEPA world model ([paper](https://arxiv.org/abs/2602.11389)): it predicts"
    if not isinstance(model, CJepaModel):
        kind = config.model_type
        what = "A DINO-WM world model ([paper](https://arxiv.org/abs/2411.04983)): autoregressive, it predicts"
    objects = "patches" if getattr(config, "token_type", None) == "patches" else "object slots"
    low, high = config.masked_slots_range
    masked = f"{low}" if low == high else f"{low} to {high}"
    encoder = (results["slot_encoder"] or {}).get("name")
    conditions = [f"actions [{config.action_size}]"] if config.action_size else []
    conditions += [f"proprioception [{config.proprio_size}]"] if config.proprio_size else []
    return card_text(
        model,
        args,
        results,
        about=f"{what} {config.num_slots} {objects} of size {config.slot_size}, {config.frame_skip} environment steps ahead per "
        f"frame, from up to {config.history_length} frames"
        + (" with " + " and ".join(conditions) if conditions else "")
        + ".",
        training=[
            f"data: `{results['dataset']}`, split `{args.train_split}`"
            + (f", slots by `{encoder}`" if encoder else ""),
            steps_taken(args, results, "windows"),
            f"{results['parameters']:,} parameters, {config.num_hidden_layers} layers"
            + (f"; slots hidden per sample: {masked} ({config.mask_strategy} masks)" if kind == "c-jepa" else ""),
            f"slot encoder inside: {'yes' if model.slot_encoder is not None else 'no'}",
        ],
        validation=f"Mean squared slot error of imagined frames (split `{args.validation_split}`): from one observed frame, "
        "from a full history (`_history`), and of repeating the last frame (`copy_`).",
        tags=[kind, "world-model"],
        task="robotics" if config.action_size else None,
    )


if __name__ == "__main__":
    main()
