"""The one training loop, on Accelerate, that every `examples/train*.py` runs.

Everything random is a pure function of (seed, step): which samples a step sees, and the state of the generators when
it starts. A run that was killed therefore continues bit for bit from its last checkpoint, and a checkpoint needs no
generator state and no position of the data beside its step number.
"""

import copy
import ctypes
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    broadcast_object_list,
    extract_model_from_parallel,
    send_to_device,
)
from huggingface_hub import ModelCardData
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm

from ..data.slots import write_text
from .arguments import TrainArguments

LossFunction = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor | float]]]
MetricFunction = Callable[[nn.Module, Any], dict[str, Tensor | float]]


@dataclass
class TrainResult:
    """What [`train`] did: `step` reached, the last evaluation's `metrics`, `seconds` of training over all resumes,
    the checkpoint it `resumed_from` (or None)."""

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    resumed_from: Path | None = None


def train(
    model: nn.Module,
    train_dataset: Dataset | Iterable,
    eval_dataset: Dataset | None,
    loss_fn: LossFunction,
    args: TrainArguments,
    *,
    metric_fn: MetricFunction | None = None,
    collate: Callable[[list], Any] | None = None,
    learning_rates: Mapping[str, float] | None = None,
    find_unused_parameters: bool = False,
    accelerator: Accelerator | None = None,
) -> TrainResult:
    """Trains `model` in place to `args.max_steps`, resuming what `args.output_dir` holds.

    When it returns, the model holds the weights to keep (the moving average where `args.ema_decay` > 0), unwrapped
    and on the device (on the CPU if its parameters were sharded). Files: `output_dir/log.jsonl`, one JSON object per
    logged step or evaluation, and `output_dir/checkpoints/step-000123/`.

    Args:
        train_dataset: map-style (batched `__getitems__` is used where there is one), or any iterable, which is
            read in order, and again from its start when it ends (`set_epoch` is called where there is one). A run is
            resumed with data of the same length and the same `fingerprint`, where they have one, alone.
        eval_dataset: map-style, evaluated without gradients in eval mode; None: no evaluation.
        loss_fn: `loss_fn(model, batch) -> (loss, scalars)`. The loss is a mean over the samples of the batch, so
            that the gradient does not depend on how a batch is shared among processes and micro-batches; the scalars
            are logged. `torch` and `numpy` start each call in a state of their own per process; Python's `random`
            starts in the same one everywhere: use it for what a whole batch shares. Other methods than the forward are
            those of [`bare`]`(model)`; where parameters are sharded, `rollout` alone.
        metric_fn: `metric_fn(model, batch) -> scalars`, averaged over `eval_dataset`; default: the loss and its
            scalars.
        collate: makes a batch of fetched samples; default: the dataset's `collate`, else torch's.
        learning_rates: AdamW learning rate for the parameters whose name starts with a key.
        find_unused_parameters: True if some steps use only a part of the parameters (several processes then look for
            the unused ones at every step). Where parameters are sharded, all processes must use the same ones.

    Raises:
        ValueError: arguments that do not fit the number of processes, the data or the checkpoint resumed from.
        FloatingPointError: the loss is not finite (the last complete checkpoint stays).
        OSError: a checkpoint could not be written, for example to a full disk (the last complete one stays).
        KeyboardInterrupt: Ctrl-C or SIGTERM; a single process first finishes its step and writes a checkpoint.
    """
    accelerator = accelerator or make_accelerator(args, find_unused_parameters)
    share = accelerator.num_processes * args.gradient_accumulation_steps
    if args.batch_size % share:
        raise ValueError(
            f"batch_size={args.batch_size} cannot be shared equally among {accelerator.num_processes} processes x "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}: choose a multiple of {share}"
        )
    output_dir = Path(args.output_dir)
    checkpoints = output_dir / "checkpoints"
    if accelerator.is_main_process:
        checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in checkpoints.glob(".*"):  # of a run that was killed while it wrote or deleted
            shutil.rmtree(leftover, ignore_errors=True)
    resumed_from = _choose_checkpoint(checkpoints, args, accelerator)

    # What is trained: the model itself, or a sharded copy, while `model` waits on the CPU for the whole weights.
    sharded = shards_model(args, accelerator)
    live = shard(model.cpu(), accelerator) if sharded else model.to(accelerator.device)
    parameters = {name: p for name, p in live.named_parameters() if p.requires_grad}
    ema = Ema(parameters, args.ema_decay) if args.ema_decay else None
    optimizers = make_optimizers(live, args, learning_rates)
    is_stream = isinstance(train_dataset, IterableDataset) or not hasattr(train_dataset, "__len__")
    data_length = None if is_stream else len(train_dataset)
    fingerprint = getattr(train_dataset, "fingerprint", None)
    if data_length == 0:
        raise ValueError("the training data set is empty: is a window longer than every episode?")
    start, seconds, running, counts, metrics = 0, 0.0, {}, {}, {}
    if resumed_from is not None:
        state, running = _load_checkpoint(resumed_from, model, optimizers, ema, args, data_length, fingerprint)
        if sharded:
            for part, value in zip(live.state_dict().values(), model.state_dict().values(), strict=True):
                part.copy_(_placed(value, like=part))
        start, seconds, counts, metrics = (state[key] for key in ("step", "seconds", "counts", "metrics"))
        running = {name: value.to(accelerator.device) for name, value in running.items()}
    log = _Log(output_dir / "log.jsonl", start, args, accelerator)
    # sharded here, or (one process launched to shard) not at all: accelerate adds the precision alone
    precision_alone = sharded or accelerator.distributed_type == DistributedType.FSDP
    wrapped = accelerator.prepare_model(live, evaluation_mode=True) if precision_alone else accelerator.prepare(live)
    batches = _batches(train_dataset, data_length, args, accelerator, start, collate)
    eval_loader = _eval_loader(eval_dataset, args, accelerator, collate, alike=sharded)

    def checkpoint(step: int) -> None:
        nonlocal running
        running = _mean_over_processes(running, accelerator)
        require_finite(step)
        if sharded:
            _gather(live, model)
        whole = [optimizer.state_dict() for optimizer in optimizers], None if ema is None else ema.shadow
        if sharded:
            whole = _whole(whole, "cpu" if accelerator.is_main_process else "meta")
        if accelerator.is_main_process:
            state = {
                "step": step,
                "seconds": seconds + time.perf_counter() - began,
                "counts": counts,
                "metrics": metrics,
                "data_length": data_length,
                "data_fingerprint": fingerprint,
                "arguments": asdict(args),
            }
            _save_checkpoint(checkpoints, state, model, *whole, running, args.save_total_limit)
        accelerator.wait_for_everyone()

    def require_finite(step: int) -> None:
        """A gradient that is not finite makes the next loss so: look at both, and never keep such weights."""
        for name in ("loss", "gradient_norm"):
            if name in running and not math.isfinite(running[name].item()):
                raise FloatingPointError(
                    f"{name} is {running[name].item()} within the steps up to {step}: look for NaN in the data, or "
                    f"lower --learning_rate (now {args.learning_rate}); " + _last_complete(checkpoints)
                )

    began, step = time.perf_counter(), start
    last_saved = start if resumed_from is not None else None
    progress = tqdm(
        total=args.max_steps,
        initial=start,
        desc="training",
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=not accelerator.is_main_process,
    )
    try:
        with _Interrupt() as interrupt, progress:
            wrapped.train()
            while step < args.max_steps:
                scalars = compute_gradients(
                    accelerator,
                    wrapped,
                    loss_fn,
                    itertools.islice(batches, args.gradient_accumulation_steps),
                    args.seed,
                    step,
                    args.gradient_accumulation_steps,
                )
                norm = nn.utils.clip_grad_norm_(parameters.values(), args.gradient_clip or math.inf)
                scalars["gradient_norm"] = _whole(norm)
                factor = learning_rate_factor(step, args)
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = group["peak_lr"] * factor
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                if ema is not None:
                    ema.update(parameters)
                step += 1
                for name, value in scalars.items():
                    running[name] = running[name] + value if name in running else value
                    counts[name] = counts.get(name, 0) + 1
                progress.update()
                finished = step == args.max_steps
                if step % args.log_every == 0 or finished:
                    running = _mean_over_processes(running, accelerator)
                    require_finite(step)
                    line = {name: value.item() / counts[name] for name, value in running.items()}
                    running, counts = {}, {}
                    elapsed = seconds + time.perf_counter() - began
                    log.write(step, {**line, "learning_rate": args.learning_rate * factor}, seconds=elapsed)
                    progress.set_postfix(loss=f"{line['loss']:.4g}", refresh=False)
                if eval_loader is not None and (finished or (args.eval_every and step % args.eval_every == 0)):
                    metrics = _evaluate(live, eval_loader, metric_fn or _loss_metrics(loss_fn), ema, accelerator, args)
                    log.write(step, {f"eval_{name}": value for name, value in metrics.items()})
                    if accelerator.is_main_process:
                        values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
                        progress.write(f"step {step}: {values}", file=sys.stderr)
                if finished or (args.save_every and step % args.save_every == 0):
                    checkpoint(step)
                    last_saved = step
                if interrupt.signal is not None and not finished:
                    # several processes may have stopped at different steps: they cannot agree on a checkpoint
                    if accelerator.num_processes == 1 and last_saved != step:
                        checkpoint(step)
                    raise KeyboardInterrupt(
                        f"{signal.Signals(interrupt.signal).name} at step {step}; " + _last_complete(checkpoints)
                    )
    finally:
        log.close()
    if start >= args.max_steps and eval_loader is not None and not metrics:
        metrics = _evaluate(live, eval_loader, metric_fn or _loss_metrics(loss_fn), ema, accelerator, args)
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False, keep_torch_compile=False)
    if ema is not None:
        ema.copy_to(parameters)
    if sharded:
        _gather(live, model)
    model.eval()
    return TrainResult(step, metrics, seconds + time.perf_counter() - began, resumed_from)


def make_accelerator(args: TrainArguments, find_unused_parameters: bool = False) -> Accelerator:
    """The `Accelerator` of a run; on a machine without a GPU it asks for the CPU, so that `torchrun` gives gloo ranks
    (without, every rank would train alone)."""
    tracker = None if args.report_to == "none" else args.report_to
    if tracker is not None:
        from importlib.util import find_spec

        if find_spec(tracker) is None:
            raise ValueError(f"--report_to {tracker} needs {tracker}: pip install 'cjepa-hf[trackers]'")
    if _launched_to_shard():  # else only the first process would get weights from `from_pretrained`
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    AcceleratorState._reset_state()  # of an earlier training in this process, whose precision may differ
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        cpu=args.use_cpu or not torch.accelerator.is_available(),
        dynamo_backend="inductor" if args.torch_compile else "no",
        log_with=tracker,
        project_dir=args.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)],
    )
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{accelerator.distributed_type.value} is not supported: launch with examples/accelerate/gpu_ddp.yaml, or, for "
            f"a model that one GPU does not hold, with examples/accelerate/gpu_fsdp.yaml"
        )
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks != accelerator.num_processes:
        raise ValueError(
            f"{ranks} processes were started but each would train alone ({accelerator.num_processes} seen): launch as "
            f"in examples/accelerate/, or pass --use_cpu"
        )
    if accelerator.device.type == "cpu" and args.keep_freed_memory:
        keep_freed_memory()
    return accelerator


def _launched_to_shard() -> bool:
    """Whether `accelerate launch` was told to use FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shards_model(args: TrainArguments, accelerator: Accelerator) -> bool:
    """Whether parameters, gradients and optimizer states are sharded over the processes (FSDP)."""
    asked = args.shard_model or _launched_to_shard()
    if asked and args.torch_compile:
        raise ValueError("torch_compile and a sharded model do not go together: leave one of them out")
    return asked and accelerator.num_processes > 1


@torch.no_grad()
def shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """
    A copy of `model` on the accelerator's devices, with the weights of the first process, whose trained parameters are
    sharded over all processes by PyTorch's `fully_shard`: its `_no_split_modules` one by one, so that one of them is whole
    at a time, then the rest. Of the copy `forward` and `rollout` may be called.
    """
    device = accelerator.device
    for value in model.state_dict().values():
        first = value.to(device)
        torch.distributed.broadcast(first, 0)
        value.copy_(first)
    live, mesh = copy.deepcopy(model), init_device_mesh(device.type, (accelerator.num_processes,))
    frozen = {parameter for parameter in live.parameters() if not parameter.requires_grad}
    for parameter in frozen:
        parameter.data = parameter.data.to(device)
    units = set(getattr(model, "_no_split_modules", None) or ())
    for module in [*live.modules()]:
        if type(module).__name__ in units and not frozen.issuperset(module.parameters()):
            fully_shard(module, mesh=mesh, ignored_params=frozen)
    fully_shard(live, mesh=mesh, ignored_params=frozen)
    if hasattr(live, "rollout"):  # is called beside forward: the parameters must be whole there too
        register_fsdp_forward_method(live, "rollout")
    # what it warns of, a change in place of what forward returns, no loss does
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    return live


def bare(model: nn.Module) -> nn.Module:
    """The module itself inside of what DDP and `torch.compile` made of it."""
    return extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)


def _whole(value: Any, device: str | None = None) -> Any:
    """
    `value`, or what is in it (dictionaries, lists, tuples), with whole tensors for sharded ones, on `device` if one is
    given: for all processes at once.
    """
    if isinstance(value, DTensor):
        value = value.full_tensor()
        return value if device is None else value.to(device)
    if isinstance(value, dict):
        return {key: _whole(part, device) for key, part in value.items()}
    return type(value)(_whole(part, device) for part in value) if isinstance(value, list | tuple) else value


def _placed(value: Tensor, like: Tensor) -> Tensor:
    """`value`, the same in every process, sharded as `like` is, if it is."""
    if not isinstance(like, DTensor):
        return value
    # each process has the whole and keeps its part, without asking the first
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _gather(live: nn.Module, model: nn.Module) -> None:
    """Copies the sharded weights of `live` into `model`, one whole tensor after the other, for all processes at once."""
    for value, part in zip(model.state_dict().values(), live.state_dict().values(), strict=True):
        value.copy_(_whole(part))


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory in the process; False where there is no glibc.

    By default large activations go back to the kernel when they are freed, and every step faults them in again: two
    trainings side by side can spend half of their time in the kernel. The same as starting the process with
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, Windows
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1))  # -1: never trim


def compute_gradients(
    accelerator: Accelerator,
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Iterable[Any],
    seed: int,
    step: int,
    count: int = 1,
) -> dict[str, Tensor]:
    """Accumulates in `.grad` the gradient of the mean loss over `count` micro-batches (and over all processes).

    Returns the means over this process's micro-batches of `loss` and of the loss function's scalars, as tensors.
    """
    totals: dict[str, Tensor] = {}
    for micro, batch in enumerate(batches):
        seed_generators(seed, step, micro, accelerator.process_index)
        # sharded gradients are summed as such: unsynchronized they would be kept whole
        last = micro == count - 1 or isinstance(model, FSDPModule)
        with nullcontext() if last else accelerator.no_sync(model):
            loss, scalars = loss_fn(model, batch)
            accelerator.backward(loss / count)
        for name, value in {"loss": loss, **scalars}.items():
            value = value.detach().float() if isinstance(value, Tensor) else torch.tensor(float(value))
            totals[name] = totals[name] + value / count if name in totals else value / count
    return totals


def seed_generators(seed: int, step: int, *place: int | str) -> None:
    """Seeds torch and numpy as a function of (seed, step, place) and Python's `random` of (seed, step) alone."""
    random.seed(_hash(seed, step))
    number = _hash(seed, step, *place)
    # not torch.manual_seed: with no GPU initialized it formats and keeps a stack trace per call, 2 ms
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(number)
    np.random.seed(number % 2**32)


def _hash(*key: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")


# --- data ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)  # a batch may lie across the end of one epoch and the start of the next
def epoch_order(seed: int, epoch: int, length: int) -> Tensor:
    """The permutation, int64 [length], in which an epoch visits the samples: a function of the arguments alone."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(_hash(seed, "epoch", epoch)))


def step_indices(seed: int, step: int, batch_size: int, length: int) -> list[int]:
    """Indices of the samples that the optimizer step sees, over all processes.

    The epochs' permutations follow each other without a gap: no sample is dropped at the end of an epoch, and a data
    set may be smaller than a batch.
    """
    indices: list[int] = []
    position = step * batch_size
    while len(indices) < batch_size:
        epoch, offset = divmod(position, length)
        part = epoch_order(seed, epoch, length)[offset : offset + batch_size - len(indices)].tolist()
        indices += part
        position += len(part)
    return indices


def micro_batch_slice(args: TrainArguments, micro: int, rank: int, ranks: int) -> slice:
    """Which part of a step's samples the process `rank` takes as its micro-batch `micro`."""
    size = args.batch_size // (ranks * args.gradient_accumulation_steps)
    first = (micro * ranks + rank) * size
    return slice(first, first + size)


class _Fetch(Dataset):
    """Fetches whole micro-batches; runs in the workers, with the generators at a state that the step determines."""

    def __init__(self, dataset: Any, collate: Callable[[list], Any] | None, seed: int):
        self.dataset, self.seed = dataset, seed
        self.collate = collate or getattr(dataset, "collate", None) or torch.utils.data.default_collate

    def __getitem__(self, item: tuple[int, tuple, list[int]]) -> Any:
        step, place, indices = item
        seed_generators(self.seed, step, "data", *place)
        if hasattr(self.dataset, "__getitems__"):
            return self.collate(self.dataset.__getitems__(indices))
        return self.collate([self.dataset[index] for index in indices])


def _batches(dataset, length, args, accelerator, start, collate) -> Iterator[Any]:
    """This process's micro-batches, on the device, from step `start` on."""
    rank, ranks = accelerator.process_index, accelerator.num_processes

    def items() -> Iterator[tuple[int, tuple, list[int]]]:
        for step in range(start, args.max_steps):
            indices = step_indices(args.seed, step, args.batch_size, length)
            for micro in range(args.gradient_accumulation_steps):
                yield step, (micro, rank), indices[micro_batch_slice(args, micro, rank, ranks)]

    if length is None:
        loader = _stream(dataset, args, rank, ranks, start, collate)
    else:
        loader = _loader(_Fetch(dataset, collate, args.seed), items(), args, accelerator)
    for batch in loader:
        yield send_to_device(batch, accelerator.device, non_blocking=True)


def _loader(fetch: _Fetch, items: Iterable, args: TrainArguments, accelerator: Accelerator) -> DataLoader:
    return DataLoader(
        fetch,
        sampler=items,
        batch_size=None,  # an item is a micro-batch
        collate_fn=_identity,
        num_workers=args.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )


def _identity(batch: Any) -> Any:
    return batch


def _stream(dataset, args, rank, ranks, start, collate) -> Iterator[Any]:
    """Micro-batches of an iterable data set. Every process reads the whole stream and keeps its share, so the samples
    of a step do not depend on the number of processes; a resumed run reads past what was seen."""
    collate = collate or getattr(dataset, "collate", None) or torch.utils.data.default_collate

    def samples() -> Iterator[Any]:
        for epoch in itertools.count():
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)
            seed_generators(args.seed, epoch, "stream")
            empty = True
            for sample in dataset:
                empty = False
                yield sample
            if empty:
                raise ValueError("the training data set is empty")

    stream = samples()
    next(itertools.islice(stream, start * args.batch_size, start * args.batch_size), None)
    for _ in range(start, args.max_steps):
        batch = list(itertools.islice(stream, args.batch_size))
        for micro in range(args.gradient_accumulation_steps):
            yield collate(batch[micro_batch_slice(args, micro, rank, ranks)])


# --- optimizers ----------------------------------------------------------------------------------------------------


def make_optimizers(
    model: nn.Module, args: TrainArguments, learning_rates: Mapping[str, float] | None = None
) -> list[torch.optim.Optimizer]:
    """AdamW, and before it Muon for the hidden matrices where asked. Each group keeps its own `peak_lr`.

    A hidden matrix is the 2-D weight of a linear layer inside a `ModuleList` (the stack of layers). Muon's update is
    scaled to the root mean square of AdamW's ("match_rms_adamw", Liu et al. 2025, arXiv 2502.16982).
    """
    learning_rates = dict(learning_rates or {})
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizers: list[torch.optim.Optimizer] = []
    hidden: set[str] = set()
    if args.optimizer == "muon":
        names = {id(parameter): name for name, parameter in named.items()}
        for stack in model.modules():
            if isinstance(stack, nn.ModuleList):
                layers = (layer for layer in stack.modules() if isinstance(layer, nn.Linear))
                hidden.update(names[id(layer.weight)] for layer in layers if id(layer.weight) in names)
        if not hidden:
            raise ValueError("optimizer=muon found no linear layer in a ModuleList to train: pass --optimizer adamw")
        optimizers.append(
            BatchedMuon(
                [named[name] for name in named if name in hidden],
                lr=args.muon_learning_rate,
                weight_decay=args.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    unused = set(learning_rates)
    for name, parameter in named.items():
        if name in hidden:
            continue
        prefix = next((prefix for prefix in learning_rates if name.startswith(prefix)), None)
        unused.discard(prefix)
        rate = args.learning_rate if prefix is None else learning_rates[prefix]
        decay = args.weight_decay if parameter.ndim > 1 and id(parameter) not in embeddings else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    if unused:
        raise ValueError(f"learning_rates names no trained parameter of the model: {sorted(unused)}")
    if groups:
        optimizers.append(
            torch.optim.AdamW(
                [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()],
                fused=next(iter(named.values())).device.type in ("cpu", "cuda"),
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon` (with "match_rms_adamw") that orthogonalizes all matrices of one shape together: a small
    model has many matrices of few shapes, and one by one they cost a quarter of a training step on a CPU."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            batches: dict[tuple, list[nn.Parameter]] = {}
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:  # of sharded ones only one at a time is whole
                    key = (parameter.shape, index if isinstance(parameter, DTensor) else None)
                    batches.setdefault(key, []).append(parameter)
            for (shape, _), parameters in batches.items():
                momenta = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                    momenta.append(state["momentum_buffer"])
                gradients = [parameter.grad for parameter in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                # a sharded matrix is orthogonalized whole, by every process
                update = torch.stack(_whole(gradients)).lerp_(
                    torch.stack(_whole(momenta)), group["momentum"]
                )  # Nesterov
                update = orthogonalize(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                # times 0.2 sqrt(longer side): the root mean square of AdamW's updates
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                updates = [_placed(one, like=parameter) for one, parameter in zip(update, parameters)]
                torch._foreach_add_(parameters, updates, alpha=-rate)


def orthogonalize(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Moves the singular values of `matrices` [K, rows, columns] near 1 by `steps` quintic Newton-Schulz iterations
    (Jordan et al. 2024, as in `torch.optim.Muon`)."""
    a, b, c = coefficients
    dtype, tall = matrices.dtype, matrices.shape[1] > matrices.shape[2]
    # bfloat16 is exact enough; below this size converting costs more on a CPU than it saves
    x = matrices if matrices.device.type == "cpu" and min(matrices.shape[1:]) <= 64 else matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(dtype)


def learning_rate_factor(step: int, args: TrainArguments) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then cosine to `lr_floor` at `max_steps`, exponential
    decay, or constant."""
    if step < args.warmup_steps:
        return (step + 1) / (args.warmup_steps + 1)
    if args.lr_scheduler == "constant":
        return 1.0
    if args.lr_scheduler == "exponential":
        return 0.5 ** ((step - args.warmup_steps) / args.lr_half_life)
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return args.lr_floor + (1 - args.lr_floor) * 0.5 * (1 + math.cos(math.pi * done))


class Ema:
    """A float32 moving average of parameters: shadow += (1 - decay_t) (weight - shadow), where decay_t rises from
    0.1 to `decay`, so that the first, untrained weights are soon forgotten."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.decay, self.updates = decay, 0
        self.shadow = {name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter]) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [p.detach().float() for p in parameters.values()]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            parameter.copy_(self.shadow[name])

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """The model holds the average inside the `with`, and its own weights again after it."""
        parameters = {name: p for name, p in model.named_parameters() if name in self.shadow}
        own = {name: p.detach().clone() for name, p in parameters.items()}
        self.copy_to(parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(own[name])


# --- evaluation and reports ----------------------------------------------------------------------------------------


def _eval_loader(dataset, args, accelerator, collate, alike: bool) -> DataLoader | None:
    """This process's share of the evaluation batches; if `alike`, as many as every other's, the last again where one lacks."""
    if dataset is None:
        return None
    length = len(dataset)
    count = min(length, args.eval_samples or length)
    if count == 0:
        raise ValueError("the validation data set is empty: is a window longer than every episode?")
    chosen = np.linspace(0, length - 1, count).round().astype(int).tolist()
    size = max(1, args.batch_size // (accelerator.num_processes * args.gradient_accumulation_steps))
    batches = [chosen[first : first + size] for first in range(0, count, size)]
    mine = [(0, ("eval", n), batch) for n, batch in enumerate(batches)]
    if alike:  # of no weight
        mine += [(0, ("again", n), batches[-1]) for n in range(-len(batches) % accelerator.num_processes)]
    mine = mine[accelerator.process_index :: accelerator.num_processes]
    return _loader(_Fetch(dataset, collate, args.seed), mine, args, accelerator)


def _loss_metrics(loss_fn: LossFunction) -> MetricFunction:
    def metrics(model: nn.Module, batch: Any) -> dict[str, Tensor | float]:
        loss, scalars = loss_fn(model, batch)
        return {"loss": loss, **scalars}

    return metrics


@torch.no_grad()
def _evaluate(model, loader, metric_fn, ema, accelerator, args) -> dict[str, float]:
    """Means over the evaluation samples, over all processes. `model` is not that wrapped by DDP: a process may have one
    batch more than another, which the wrapped forward would wait for."""
    model.eval()
    totals: dict[str, Tensor] = {}
    samples = 0
    with ema.applied_to(model) if ema is not None else nullcontext(), accelerator.autocast():
        for (_, place, indices), batch in zip(loader.sampler, loader):
            seed_generators(args.seed, 0, *place)
            count = 0 if place[0] == "again" else len(indices)
            values = metric_fn(model, send_to_device(batch, accelerator.device, non_blocking=True))
            for name, value in values.items():
                value = torch.as_tensor(value, device=accelerator.device).double() * count
                totals[name] = totals.get(name, 0) + value
            samples += count
        if isinstance(model, FSDPModule):  # whole since the last forward: the weights put back below are the shards
            model.reshard()
    model.train()
    gathered = [(samples, {name: value.item() for name, value in totals.items()})]
    if accelerator.num_processes > 1:
        everyone: list = [None] * accelerator.num_processes
        torch.distributed.all_gather_object(everyone, gathered[0])
        gathered = everyone
    count = sum(samples for samples, _ in gathered)
    names = dict.fromkeys(name for _, part in gathered for name in part)
    return {name: sum(part.get(name, 0.0) for _, part in gathered) / count for name in names}


def _mean_over_processes(values: dict[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    if accelerator.num_processes == 1 or not values:
        return values
    stacked = torch.stack([value.to(accelerator.device, torch.float32) for value in values.values()])
    return dict(zip(values, accelerator.reduce(stacked, "mean").unbind()))


class _Log:
    """`log.jsonl` and the tracker, on the main process. Lines past the step that a run resumes from are dropped: it
    writes them again."""

    def __init__(self, path: Path, start: int, args: TrainArguments, accelerator: Accelerator):
        self.accelerator, self.file, self.tracks = accelerator, None, args.report_to != "none"
        if self.tracks:
            accelerator.init_trackers(
                re.sub(r"\W+", "-", Path(args.output_dir).resolve().name) or "run",
                config={name: value for name, value in asdict(args).items() if value is not None},
            )
        if accelerator.is_main_process:
            kept = [line for line in read_log(path) if line["step"] <= start] if start else []
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, float], **more: float) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **values, **more}) + "\n")
            self.file.flush()
        if self.tracks:
            self.accelerator.log(values, step=step)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.tracks:
            self.accelerator.end_training()


def read_log(path: str | Path) -> list[dict[str, float]]:
    """The lines of a `log.jsonl`; [] where there is none. A last line that a kill cut off is left out."""
    lines = []
    with Path(path).open(encoding="utf-8") if Path(path).exists() else nullcontext([]) as file:
        for line in file:
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return lines


# --- checkpoints ---------------------------------------------------------------------------------------------------


def _save_checkpoint(folder, state, model, optimizer_states, average, running, limit) -> None:
    """Writes `folder/step-000123`: under a temporary name, flushed to the disk, then renamed."""
    final = folder / f"step-{state['step']:06d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        temporary.mkdir()
        save_model(model, str(temporary / "model.safetensors"))
        if hasattr(getattr(model, "config", None), "save_pretrained"):
            model.config.save_pretrained(temporary)  # so that from_pretrained reads a checkpoint too
        if average is not None:
            save_file(average, temporary / "ema.safetensors", metadata={"updates": str(state["step"])})
        torch.save(
            {
                "optimizers": optimizer_states,
                "running": {name: value.cpu() for name, value in running.items()},
            },
            temporary / "optimizer.pt",
        )
        (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        manifest = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _flush_to_disk(path)
        _remove(final)  # a damaged one of the same step
        os.replace(temporary, final)
        _flush_to_disk(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            error.errno,
            f"could not write the checkpoint {final}: {error.strerror or error}; "
            + _last_complete(folder)
            + ", after making room",
        ) from error
    except Exception:  # safetensors and torch.save have errors of their own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in [path for path in _step_folders(folder) if _step(path) <= state["step"]][:-limit] if limit else []:
        _remove(old)


def _load_checkpoint(folder, model, optimizers, ema, args, data_length, fingerprint) -> tuple[dict, dict[str, Tensor]]:
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    before = {name: state[name] for name in ("data_length", "data_fingerprint") if name in state} | state["arguments"]
    expected = {"data_length": data_length} | {name: getattr(args, name) for name in args.fixed_on_resume}
    config = getattr(model, "config", None)
    if hasattr(config, "from_pretrained"):  # of equal weights, a configuration may still mask or predict otherwise
        before |= {f"config.{name}": value for name, value in _own_fields(config.from_pretrained(folder)).items()}
        expected |= {f"config.{name}": value for name, value in _own_fields(config).items()}
    expected["data_fingerprint"] = fingerprint  # last: whatever else differs says why these do
    for name, now in expected.items():
        if name in before and before[name] != now:
            raise ValueError(
                f"{folder} was trained with {name}={before[name]!r}, this run has {now!r}, and would not continue it: use "
                f"the same, or another --output_dir"
            )
    if bool(state["arguments"]["ema_decay"]) != (ema is not None):
        raise ValueError(
            f"{folder} was trained with ema_decay={state['arguments']['ema_decay']}, this run has {args.ema_decay}: "
            f"the moving average cannot be turned on or off when resuming"
        )
    try:
        load_model(model, str(folder / "model.safetensors"))
        saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        for optimizer, optimizer_state in zip(optimizers, saved["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]  # learning rates and the like are this run's
            if [group["params"] for group in groups] != [g["params"] for g in optimizer_state["param_groups"]]:
                raise ValueError("its parameters are grouped otherwise")
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments = {
                k: {
                    name: _placed(v, like=parameters[k]) if v.shape == parameters[k].shape else v
                    for name, v in one.items()
                }
                for k, one in optimizer_state["state"].items()
            }
            optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if ema is not None:
            for name, value in load_file(folder / "ema.safetensors").items():
                ema.shadow[name].copy_(_placed(value, like=ema.shadow[name]))
            ema.updates = state["step"]
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is a checkpoint of another model: {error}") from error
    return state, saved["running"]


def _own_fields(config) -> dict[str, Any]:
    """The fields that a model's configuration class declares itself, as JSON values; nested configurations left out."""
    names = [name for name in type(config).__annotations__ if name != "model_type" and not name.endswith("_config")]
    return json.loads(json.dumps({name: getattr(config, name) for name in names}))


def _choose_checkpoint(folder: Path, args: TrainArguments, accelerator: Accelerator) -> Path | None:
    """The checkpoint to resume from, chosen by the main process (others may see a slower file system)."""
    choice: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            choice[0] = find_checkpoint(folder, args.resume_from_checkpoint)
        except ValueError as error:
            choice[0] = error
    broadcast_object_list(choice)
    if isinstance(choice[0], ValueError):
        raise choice[0]
    return choice[0]


def find_checkpoint(folder: str | Path, resume: str = "auto") -> Path | None:
    """The checkpoint that `--resume_from_checkpoint resume` means, among those in `folder`; None: start at step 0.

    With "auto", the newest complete one; those that are damaged are named on stderr and passed over.

    Raises:
        ValueError: a checkpoint given by path is damaged; or "none" where `folder` holds complete checkpoints.
    """
    folder = Path(folder)
    if resume not in ("auto", "none"):
        problem = checkpoint_problem(Path(resume))
        if problem:
            raise ValueError(
                f"cannot resume from {resume}: {problem}; --resume_from_checkpoint auto finds a whole one"
            )
        newer = [path for path in _step_folders(folder) if _step(path) > _step(Path(resume))]
        if newer and Path(resume).resolve().parent == folder.resolve():
            raise ValueError(
                f"{newer[-1]} is newer than {resume}: move it away to rewind this run, or continue in another "
                f"--output_dir"
            )
        return Path(resume)
    for path in reversed(_step_folders(folder)):
        problem = checkpoint_problem(path)
        if problem:
            print(f"{path} is passed over: {problem}", file=sys.stderr)
        elif resume == "none":
            raise ValueError(
                f"{folder} holds checkpoints of an earlier run: continue it with --resume_from_checkpoint auto, or "
                f"choose another --output_dir"
            )
        else:
            return path
    return None


def checkpoint_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint folder; None when every file is as it was written."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, digest in manifest.items():
            if _digest(path / name) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, AttributeError) as error:
        return f"it is incomplete ({error})"
    return None


def _last_complete(folder: Path) -> str:
    whole = next((path for path in reversed(_step_folders(folder)) if not checkpoint_problem(path)), None)
    if whole is None:
        return "there is no complete checkpoint yet"
    return f"the last complete checkpoint is {whole}, and the same command continues from it"


def _step_folders(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)), key=_step)


def _step(path: Path) -> int:
    number = re.search(r"(\d+)$", path.name)
    return int(number[1]) if number else 0


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Deletes a folder so that a kill on the way leaves no half of it under its name."""
    if path.exists():
        gone = path.with_name(f".{path.name}.deleted")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


class _Interrupt:
    """Notes the first Ctrl-C or SIGTERM for the loop to act on between steps; a second Ctrl-C stops at once."""

    def __init__(self):
        self.signal: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "_Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        print(f"\n{signal.Signals(number).name}: stopping after this step", file=sys.stderr)

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# --- results -------------------------------------------------------------------------------------------------------


def save_model_folder(model: nn.Module, folder: str | Path, files: Mapping[str, str] | None = None) -> None:
    """`model.save_pretrained(folder)` plus text `files` (name -> content), each whole or absent.

    Everything is written to a temporary folder first and moved in, the weights last: a folder that was interrupted
    has no weights, and does not load.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".model.{os.getpid()}"
    try:
        model.save_pretrained(temporary)
        for name, text in (files or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        weights = sorted(path.name for path in temporary.iterdir() if "safetensors" in path.name)
        for name in weights:  # safetensors makes files that their owner alone can read (its issue 782)
            shutil.copymode(temporary / "config.json", temporary / name)
        for path in folder.glob("model*.safetensors*"):  # a probe beside them stays
            path.unlink()
        for name in sorted(path.name for path in temporary.iterdir() if path.name not in weights) + weights:
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def train_and_save(
    model: nn.Module,
    train_dataset: Dataset | Iterable,
    eval_dataset: Dataset | None,
    loss_fn: LossFunction,
    args: TrainArguments,
    files: Callable[[TrainResult], Mapping[str, str]],
    accelerator: Accelerator,
    **options,
) -> TrainResult:
    """[`train`] (which takes `options`) as a script: then the main process saves the model with the text `files(result)`,
    and uploads them if `args` say so. Ctrl-C and SIGTERM end the program (SystemExit)."""
    if args.push_to_hub and accelerator.is_main_process:
        create_hub_repository(args)
    try:
        result = train(model, train_dataset, eval_dataset, loss_fn, args, accelerator=accelerator, **options)
    except KeyboardInterrupt as interrupt:
        raise SystemExit(f"stopped: {interrupt}") from None
    if accelerator.is_main_process:
        save_model_folder(model, args.output_dir, files(result))
        if args.push_to_hub:
            print(push_folder_to_hub(args), file=sys.stderr)
    accelerator.wait_for_everyone()
    return result


def training_results(
    result: TrainResult, parameters: Iterable[nn.Parameter], dataset: str, **more: Any
) -> dict[str, Any]:
    """What `training_results.json` says. Of a `dataset` folder it is the name alone: its place on this machine means
    nothing elsewhere. `parameters` are those to count, `more` is added as it is."""
    return {
        "dataset": Path(dataset).name if Path(dataset).exists() else dataset,
        "step": result.step,
        "training_seconds": round(result.seconds, 1),
        "validation": result.metrics,
        "parameters": sum(p.numel() for p in parameters),
        **more,
    }


def result_files(args: TrainArguments, overrides: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, str]:
    """Texts of `training_args.json`, which can be given back as the first argument, and `training_results.json`."""
    arguments = {name: value for name, value in asdict(args).items() if value is not None}
    return {
        "training_args.json": json.dumps(arguments | dict(overrides), indent=2),
        "training_results.json": json.dumps(results, indent=2),
    }


def card_text(
    model: nn.Module,
    args: TrainArguments,
    results: Mapping[str, Any],
    *,
    about: str,
    training: Sequence[str],
    validation: str,
    tags: Sequence[str],
    task: str | None = None,
    processor: str | None = None,
) -> str:
    """
    README.md of a trained folder: front matter with `tags` and the pipeline `task`, `about`, how it is loaded (the model, and
    the class `processor`), `training` (lines about data, batches and model), and, if `results` hold some, metrics explained
    by `validation`.
    """
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    classes = {"model": type(model).__name__} | ({"processor": processor} if processor else {})
    lines = [
        "---",
        ModelCardData(library_name="cjepa_hf", pipeline_tag=task, tags=list(tags)).to_yaml(),
        "---",
        "",
        f"# {name}",
        "",
        about,
        "",
        "```python",
        "import cjepa_hf",
        f"from cjepa_hf import {', '.join(classes.values())}",
        "",
        *(f'{variable} = {loaded}.from_pretrained("{name}")' for variable, loaded in classes.items()),
        "```",
        "",
        "## Training",
        "",
        *(f"- {line}" for line in training),
        "- all arguments: `training_args.json`",
        "",
    ]
    if results["validation"]:
        metrics = [f"| {metric} | {value:.4g} |" for metric, value in results["validation"].items()]
        lines += ["## Validation", "", validation, "", "| metric | value |", "|---|---|", *metrics, ""]
    return "\n".join(lines)


def steps_taken(args: TrainArguments, results: Mapping[str, Any], items: str) -> str:
    """How long a training was, in words: `items` are what a batch holds."""
    return (
        f"{results['step']} steps of {args.batch_size} {items}, {args.optimizer}, seed {args.seed}, "
        f"{results['training_seconds'] / 60:.1f} minutes"
    )


def create_hub_repository(args: TrainArguments) -> None:
    """Creates the repository before the training, so that a missing token or right shows at once."""
    from huggingface_hub import HfApi

    HfApi().create_repo(args.hub_model_id, private=args.hub_private, exist_ok=True)


def push_folder_to_hub(args: TrainArguments) -> str:
    """Uploads weights (safetensors alone), json and card of the trained folder in one commit; returns its address.

    Weights that an earlier upload left, which would be loaded beside or instead of the new ones, go with the same commit.
    The folder is loaded first, as `cjepa-hf publish` does: ValueError, and nothing sent, if it does not fit or holds NaN.
    """
    from huggingface_hub import HfApi

    from ..models.checks import checked_model

    checked_model(args.output_dir)
    return HfApi().upload_folder(
        repo_id=args.hub_model_id,
        folder_path=args.output_dir,
        commit_message="Trained model",
        allow_patterns=["*.safetensors", "*.json", "*.jsonl", "README.md", "LICENSE"],
        ignore_patterns=["*/*", ".*"],  # checkpoints and logs of trackers
        delete_patterns=["*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*"],
    )
