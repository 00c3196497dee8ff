"""Frames to slots: runs a slot encoder over the videos of any source (see `video`) and writes a slot dataset."""

import contextlib
import functools
import hashlib
import inspect
import itertools
import json
import logging
import os
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.utils import cached_file, extract_commit_hash

from ..simulators.rendering import render_collisions
from .slots import METADATA_FILE, PARTIAL_FOLDER, SlotDatasetWriter, fingerprint, is_finished
from .video import FrameVideo, Video, check_lengths, open_source

__all__ = ["encode_scenes", "encode_videos", "extract_slots"]

logger = logging.getLogger(__name__)


def extract_slots(
    source: str | os.PathLike | datasets.DatasetDict | datasets.Dataset,
    encoder: str | os.PathLike | torch.nn.Module,
    output_dir: str | os.PathLike,
    *,
    image_processor: Callable | None = None,
    splits: Sequence[str] | None = None,
    frame_skip: int = 5,
    dtype: str = "float32",
    batch_size: int = 64,
    num_videos: int = 8,
    seed: int = 0,
    device: str | torch.device | None = None,
    num_frames: int | None = None,
    render_resolution: int | None = None,
    render_options: Mapping | None = None,
    source_revision: str | None = None,
    encoder_revision: str | None = None,
    frames_per_file: int = 4096,
    num_readers: int | None = None,
    strict: bool = False,
    progress: bool = True,
) -> Path:
    """Encode every frame of `source` and write the slots, with the source's other columns, to `output_dir`.

    Run again with the same arguments after an interruption, it goes on after the last finished file; on a finished
    folder it returns at once. Started in several processes (`accelerate launch`, `torchrun`), each one encodes every
    n-th file: batches never cross the border of a file, so the files are the same as those of a single process. The
    processes meet in `output_dir`, which all of them must see, and nowhere else.

    Args:
        source: whatever [`open_source`](video.py) takes: files, folders, a Hub id, a `DatasetDict`. `actions`,
            `proprio`, `state` and `contacts` [T, ...] are copied along.
        encoder: folder, Hub id or model whose `forward(pixel_values=[B, T, 3, H, W])` returns `.slots` [B, T, N, D],
            or a `CJepaModel` that holds one; see [`encode_videos`].
        image_processor: turns uint8 frames [T, H, W, 3] into `pixel_values`. Default: the encoder's own where its
            folder has one, else that of its kind (the encoders of this library have one each), else pixels / 255.
        splits: names of the splits; default: all.
        frame_skip: suggested for windows, stored in the dataset.
        dtype: "float32" or "float16" of the stored slots.
        batch_size: frames per forward.
        num_videos: videos per forward (encoders with memory), which then see `batch_size // num_videos` frames each.
        seed: with a video's name, makes the seed of everything random about that video.
        device: default: where a given model is; for a loaded model CUDA if there is one (each process its own).
        num_frames: stop each split after the video that reaches this many frames.
        render_resolution: pixels per side of frames drawn from states; default: what the encoder takes.
        render_options: more arguments of the renderer, such as `{"goal_pose": None}`.
        source_revision, encoder_revision: branch, tag or commit on the Hub.
        frames_per_file: frames per Parquet file, which is also what an interruption can lose.
        num_readers: threads that read and decode videos while the encoder runs; default: one per core, at most 8.
        strict: end with an error, after everything was written, if a video was left out.
        progress: show a bar with the remaining time.

    Returns:
        `output_dir`. Damaged videos (unreadable or cut off, NaN states, columns of unequal length, slots that are not
        finite) are left out, named in a warning at the end and listed under `skipped` in `slot_dataset.json`.

    Raises:
        FileExistsError: `output_dir` is a finished dataset made with other arguments.
        ValueError: nothing in the source is a video, the encoder does not take its frames, other arguments (another
            content of the source or other weights are others too) than the interrupted run's, no video could be read,
            or `strict`.
    """
    sizes = {"batch_size": batch_size, "num_videos": num_videos, "frames_per_file": frames_per_file}
    for name, value in (sizes | {"num_frames": num_frames, "render_resolution": render_resolution}).items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, it is {value}")
    model, image_processor, description = open_encoder(encoder, encoder_revision, image_processor, device)
    opened = open_source(
        source,
        splits=splits,
        revision=source_revision,
        render_resolution=render_resolution or drawn_size(model),
        render_options=render_options,
    )
    num_readers = num_readers or min(os.cpu_count() or 1, 8)
    with ThreadPoolExecutor(num_readers) as pool:
        headers = {split: list(pool.map(_header, videos)) for split, videos in opened.splits.items()}
    lengths = {split: [length for length, _ in values] for split, values in headers.items()}
    rates = {rate for values in headers.values() for length, rate in values if length}
    if image_processor is not None:
        has_dict = hasattr(image_processor, "to_dict")
        description["image_processor"] = fingerprint(
            image_processor.to_dict() if has_dict else type(image_processor).__name__
        )
    arguments = {
        "frame_skip": frame_skip,
        "encoder": {**description, "seed": seed},
        "source": {
            "name": opened.name,
            "revision": source_revision,
            "content": fingerprint(
                [opened.metadata.get("content"), [[s, opened.content(s), lengths[s]] for s in opened.splits]]
            ),
            "splits": list(opened.splits),
            "num_frames": num_frames,
            "frames_per_file": frames_per_file,
            **({"render": opened.metadata["render"]} if "render" in opened.metadata else {}),
        },
        "fps": rates.pop() if len(rates) == 1 else None,
        "units": opened.metadata.get("units"),
        "dtype": dtype,
    }
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    output_dir = Path(output_dir)
    writer = _open_writer(output_dir, rank, arguments)
    if writer is None:
        logger.info("%s is complete: nothing to do", output_dir)
        _report_damaged(output_dir, opened.name, strict)
        return output_dir

    files: list[tuple[str, int, list[Video]]] = []  # every file of the dataset: split, number, its videos
    sizes: dict[tuple[str, int], int] = {}
    for split, videos in opened.splits.items():
        for number, part in enumerate(_parts(lengths[split], frames_per_file, num_frames)):
            files.append((split, number, [videos[i] for i in part]))
            sizes[split, number] = sum(lengths[split][i] for i in part)
    mine = [file for file in files[rank::world] if not writer.has_file(*file[:2])]
    widths = _column_widths(opened.splits.values())
    bar = tqdm(
        total=sum(sizes[file[:2]] for file in mine),
        unit="frame",
        desc="slots" if world == 1 else f"slots (process 1 of {world})",
        disable=not progress or rank > 0,
    )
    encoded = encode_videos(
        (videos for _, _, videos in mine), model, image_processor, batch_size=batch_size, num_videos=num_videos,
        seed=seed, num_readers=num_readers, update=bar.update,
    )  # fmt: skip
    with contextlib.closing(encoded), _nothing_left(output_dir, world):  # an interruption ends the threads
        for results, (split, number, _) in zip(encoded, mine):
            episodes, damaged = [], []
            for result in results:
                try:
                    episodes.append(_episode(result, widths))
                except ValueError as error:
                    damaged.append({"episode_id": result.video.name, "reason": str(error)})
            writer.write_file(split, number, episodes, damaged)
    bar.close()
    if rank > 0:
        _wait(lambda: (output_dir / METADATA_FILE).exists())
    else:
        _wait(lambda: all(writer.has_file(split, number) for split, number, _ in files))
        try:
            writer.close()
        except ValueError as error:
            if not writer.skipped or any(writer.finished(split) for split in opened.splits):
                raise
            writer.retry_damaged()
            first = writer.skipped[0]
            raise ValueError(
                f"{opened.name}: none of the {len(writer.skipped)} episodes of split {first['split']!r} could be used; "
                f"the first, {first['episode_id']!r}: {first['reason']}"
            ) from error
        _report_damaged(output_dir, opened.name, strict)
    return output_dir


def _report_damaged(output_dir: Path, name: str, strict: bool) -> None:
    skipped = json.loads((output_dir / METADATA_FILE).read_text(encoding="utf-8"))["skipped"]
    if not skipped:
        return
    listed = "; ".join(f"{s['split']} {s['episode_id']!r}: {s['reason']}" for s in skipped[:10])
    more = f"; and {len(skipped) - 10} more" if len(skipped) > 10 else ""
    message = (
        f"{len(skipped)} damaged episodes of {name} were left out (all are listed in {METADATA_FILE}): {listed}{more}"
    )
    if strict:
        raise ValueError(f"{message}. The dataset in {output_dir} is complete without them")
    logger.warning("%s", message)


def _header(video: Video) -> tuple[int, float | None]:
    """Announced frames and frames per second; (0, None) of a damaged video, which says what is wrong when it is read."""
    try:
        return len(video), video.fps
    except ImportError:
        raise
    except Exception:
        return 0, None


def _parts(lengths: Sequence[int], frames_per_file: int, num_frames: int | None) -> Iterator[list[int]]:
    """Consecutive videos for each file: it is full as soon as it has `frames_per_file` frames."""
    part, total, before = [], 0, 0
    for index, length in enumerate(lengths):
        if num_frames is not None and before >= num_frames:
            break
        part.append(index)
        total, before = total + length, before + length
        if total >= frames_per_file:
            yield part
            part, total = [], 0
    if part:
        yield part


def _open_writer(output_dir: Path, rank: int, arguments: dict) -> SlotDatasetWriter | None:
    """None if the dataset is finished. Processes other than the first wait until that one has made the folder."""
    if rank > 0:
        started = output_dir / PARTIAL_FOLDER / "arguments.json"
        _wait(lambda: started.exists() or (output_dir / METADATA_FILE).exists())
    if is_finished(output_dir, arguments):
        return None
    try:
        return SlotDatasetWriter(output_dir, **arguments)
    except OSError:
        if rank > 0 and is_finished(output_dir, arguments):  # meanwhile
            return None
        raise


@contextlib.contextmanager
def _nothing_left(output_dir: Path, world: int) -> Iterator[None]:
    """An error before the first file leaves no mark, which would keep another encoder out of `output_dir`."""
    partial = output_dir / PARTIAL_FOLDER
    try:
        yield
    except BaseException:
        if not any(partial.glob("*-[0-9]*.json")):
            if world == 1:
                shutil.rmtree(partial, ignore_errors=True)
            else:  # the others may still write
                logger.warning("to use %s with other arguments, remove %s first", output_dir, partial)
        raise


def _wait(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.2)


def _column_widths(splits: Iterable[Sequence[Video]]) -> dict[str, int] | None:
    """Names and sizes of the columns of the first readable video: every video must have them."""
    for video in itertools.chain.from_iterable(splits):
        try:
            return {name: values.shape[1] for name, values in video.columns().items()}
        except ImportError:
            raise
        except Exception:
            continue
    return None


def _episode(result: "Encoded", widths: dict[str, int]) -> dict:
    """What the writer takes; ValueError for a damaged video."""
    if result.error is not None:
        reason, path = f"{type(result.error).__name__}: {result.error}", result.video.path
        # a folder's name without its place: datasets are published
        raise ValueError(reason.replace(f"{path.parent}{os.sep}", "") if path else reason) from result.error
    slots = np.concatenate(result.slots)
    check_lengths(result.columns, len(slots))
    found = {name: values.shape[1] for name, values in result.columns.items()}
    if found != widths:
        raise ValueError(f"it has the columns {found}, the first video has {widths}: give every video the same")
    return {"episode_id": result.video.name, "slots": slots, **result.columns}


# --------------------------------------------------------------------------------------------------------------------
# Reading while encoding


class Encoded:
    """A video on its way: `slots` are arrays [t, N, D] that follow each other, `error` is why it is damaged or None."""

    def __init__(self, video: Video, pool: ThreadPoolExecutor, preprocess: Callable, size: int):
        self.video, self.columns, self.slots, self.masks, self.error = video, {}, [], [], None
        self._pool, self._steps = pool, self._read(preprocess, size)
        self._next = pool.submit(next, self._steps, None)

    def _read(self, preprocess, size) -> Iterator[torch.Tensor]:
        self.columns = self.video.columns()
        for frames in self.video.chunks(size):
            yield preprocess(frames)

    def part(self) -> torch.Tensor | None:
        """The next pixel values [at most `size`, 3, H, W], which a thread has read already, or None at the end."""
        if self._next is None:
            return None
        try:
            pixels = self._next.result()
        except (ImportError, EncoderMismatch):
            raise
        except Exception as error:  # whatever goes wrong in a decoder or in our checks is the fault of this video
            self.error, pixels = error, None
        self._next = None if pixels is None else self._pool.submit(next, self._steps, None)
        return pixels

    def take(self, output: dict, *place) -> None:
        """Keep what the encoder returned for this video: `place` is where in [B, T]."""
        self.slots.append(output["slots"][place])
        if output["masks"] is not None:
            self.masks.append(output["masks"][place])


class EncoderMismatch(ValueError):
    """No video of this source fits the encoder."""


def encode_videos(
    groups: Iterable[Sequence[Video]],
    model: torch.nn.Module,
    image_processor: Callable | None = None,
    *,
    batch_size: int = 64,
    num_videos: int = 8,
    seed: int = 0,
    num_readers: int = 2,
    update: Callable[[int], object] | None = None,
    keep_masks: bool = False,
) -> Iterator[list[Encoded]]:
    """Encode groups of videos; batches never cross the border of a group, so its slots depend on nothing else.

    Threads read, decode and preprocess the videos that come next while the encoder runs. Memory: the slots of one
    group, and two batches of pixels for each video that is open.

    - `model.memoryless` (or that of its config): frames of all videos share batches of `batch_size`.
    - its forward takes `seeds` and `state`: `num_videos` videos of similar length go side by side, in parts of
      `batch_size // num_videos` frames; `state` of one part goes into the next, so that long videos are whole.
    - any other: a whole video at a time, after `torch.manual_seed`.

    Yields:
        For each group its videos in their order, as [`Encoded`].
    """
    memoryless = bool(getattr(model, "memoryless", getattr(getattr(model, "config", None), "memoryless", False)))
    side_by_side = not memoryless and {"seeds", "state"} <= set(inspect.signature(model.forward).parameters)
    size = max(1, batch_size // num_videos) if side_by_side else batch_size
    update = update or (lambda count: None)
    was_training = model.training
    model.eval()
    pool = ThreadPoolExecutor(num_readers)
    preprocess = functools.partial(_pixel_values, image_processor=image_processor, model=model)

    def ordered():
        for group in groups:
            order = (
                sorted(range(len(group)), key=lambda i: _header(group[i])[0]) if side_by_side else range(len(group))
            )
            yield group, list(order)

    # Two views of the same order: one opens videos ahead, the other takes them.
    ahead, taken = itertools.tee(ordered())
    to_open = (group[i] for group, order in ahead for i in order)
    waiting: deque[Encoded] = deque()
    in_advance = num_readers + (num_videos if side_by_side else 1)

    def take() -> Encoded:
        while len(waiting) < in_advance and (video := next(to_open, None)) is not None:
            waiting.append(Encoded(video, pool, preprocess, size))
        return waiting.popleft()

    encode = functools.partial(_forward, model, keep_masks=keep_masks)
    try:
        for group, order in taken:
            jobs = (take() for _ in order)
            if memoryless:
                done = _encode_frames(jobs, encode, batch_size, update)
            elif side_by_side:
                done = _encode_side_by_side(jobs, encode, num_videos, seed, update)
            else:
                done = _encode_one_by_one(jobs, encode, seed, update)
            result: list = [None] * len(group)
            for index, job in zip(order, done, strict=True):
                result[index] = job
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
        model.train(was_training)


def encode_scenes(
    scenes: Iterable[tuple[str, np.ndarray]],
    model: torch.nn.Module,
    image_processor: Callable | None = None,
    *,
    resolution: int,
    group_size: int = 64,
    **options,
) -> Iterator[Encoded]:
    """
    Draw collision scenes and encode them.

    Args:
        scenes: (name, states [T, 60]) of each.
        resolution: pixels per side of the frames.
        group_size: scenes that are encoded together.
        options: of [`encode_videos`].

    Yields [`Encoded`] of every scene. Raises `ValueError` where the encoder fails.
    """

    def video(name: str, states: np.ndarray) -> Video:
        return FrameVideo(
            lambda: lambda part: render_collisions(states[part], resolution=resolution), len(states), name
        )

    def groups() -> Iterator[list[Video]]:
        left = iter(scenes)
        while group := [video(*scene) for scene in itertools.islice(left, group_size)]:
            yield group

    for done in encode_videos(groups(), model, image_processor, **options):
        for encoded in done:
            if encoded.error is not None:
                raise ValueError(f"{encoded.video.name}: the encoder failed: {encoded.error}") from encoded.error
            yield encoded


def _encode_frames(jobs, encode, batch_size, update) -> list[Encoded]:
    """Batches of `batch_size` single frames, across the borders of videos."""
    done: list[Encoded] = []
    held: list[tuple[Encoded, torch.Tensor]] = []

    def flush():
        output = encode(torch.cat([pixels for _, pixels in held])[:, None])
        first = 0
        for job, pixels in held:
            job.take(output, slice(first, first + len(pixels)), 0)
            first += len(pixels)
        update(first)
        held.clear()

    for job in jobs:
        done.append(job)
        while (pixels := job.part()) is not None:
            if held and held[0][1].shape[1:] != pixels.shape[1:]:
                flush()
            while len(pixels):
                count = batch_size - sum(len(p) for _, p in held)
                held.append((job, pixels[:count]))
                pixels = pixels[count:]
                if count <= len(held[-1][1]):
                    flush()
    if held:
        flush()
    return done


def _encode_side_by_side(jobs, encode, num_videos, seed, update) -> list[Encoded]:
    done: list[Encoded] = []
    while batch := list(itertools.islice(jobs, num_videos)):
        done += batch
        parts = [job.part() for job in batch]
        batch = [job for job, part in zip(batch, parts) if part is not None]
        parts = [part for part in parts if part is not None]
        start = {"seeds": [_seed(seed, job.video) for job in batch]}
        while any(part is not None for part in parts):
            shapes = {tuple(part.shape[1:]) for part in parts if part is not None}
            if len(shapes) > 1:
                raise EncoderMismatch(
                    f"videos of different frame sizes {sorted(shapes)} cannot be encoded side by side: give an "
                    f"image_processor that resizes them, or num_videos=1"
                )
            longest = max(len(part) for part in parts if part is not None)
            pixels = torch.zeros(len(batch), longest, *shapes.pop())
            for row, part in zip(pixels, parts):
                if part is not None:  # what is behind the end of a video is cut off afterwards
                    row[: len(part)] = part
            output = encode(pixels, **start)
            for index, (job, part) in enumerate(zip(batch, parts)):
                if part is not None:
                    job.take(output, index, slice(0, len(part)))
                    update(len(part))
            start = {"state": output["state"]}
            parts = [job.part() for job in batch]
    return done


def _encode_one_by_one(jobs, encode, seed, update) -> list[Encoded]:
    done: list[Encoded] = []
    for job in jobs:
        done.append(job)
        parts = list(iter(job.part, None))
        if parts and job.error is None:
            with torch.random.fork_rng():
                torch.manual_seed(_seed(seed, job.video))
                job.take(encode(torch.cat(parts)[None]), 0, slice(None))
            update(sum(map(len, parts)))
    return done


def _seed(seed: int, video: Video) -> int:
    """The same for a video in every run, batch and process."""
    return zlib.crc32(f"{seed} {video.name}".encode())


# --------------------------------------------------------------------------------------------------------------------
# Encoder


def open_encoder(encoder, revision, image_processor, device) -> tuple[torch.nn.Module, Callable | None, dict]:
    """Model on its device, image processor, and what the dataset records of them (`revision`: the commit on the Hub)."""
    commit = None
    if isinstance(encoder, torch.nn.Module):
        model, name = encoder, getattr(getattr(encoder, "config", None), "name_or_path", "") or type(encoder).__name__
    else:
        name = str(encoder)
        if not Path(name).is_dir():
            # one commit, recorded below, for the weights and the processor, whatever is pushed meanwhile
            commit = extract_commit_hash(cached_file(name, "config.json", revision=revision), None) or revision
            revision = commit
        # Slots are data: full precision, whatever the checkpoint was saved in. Pickled weights are refused.
        model = AutoModel.from_pretrained(name, revision=revision, dtype=torch.float32, use_safetensors=True)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if str(device) == "cuda" and "LOCAL_RANK" in os.environ:  # one of several processes
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        files = ("preprocessor_config.json", "processor_config.json")
        if image_processor is None and (not Path(name).is_dir() or any((Path(name) / f).exists() for f in files)):
            try:
                image_processor = AutoImageProcessor.from_pretrained(name, revision=revision)
            except OSError:  # the repository has none
                image_processor = None
    if hasattr(model, "slot_encoder"):  # a world model
        if model.slot_encoder is None:
            raise ValueError(f"{name} is a world model without a slot encoder: give the encoder that made its slots")
        model = model.slot_encoder
    if image_processor is None:
        image_processor = usual_image_processor(getattr(model, "config", None))
    if device is not None:
        model = model.to(device)
    config = model.config.to_dict() if hasattr(getattr(model, "config", None), "to_dict") else {}
    volatile = ("transformers_version", "_name_or_path", "name_or_path", "dtype", "torch_dtype", "architectures")
    description = {
        # a folder's name without its place: datasets are published
        "name": Path(name).resolve().name if Path(name).is_dir() else name,
        "revision": commit,
        "config_hash": fingerprint({k: v for k, v in config.items() if k not in volatile and k != "_commit_hash"}),
        "weights_hash": weights_hash(model),
    }
    empty = getattr(model, "empty_slot", None)
    if empty is not None:
        description["empty_slot"] = empty.float().tolist()
    return model, image_processor, description


def usual_image_processor(config) -> Callable | None:
    """That of the encoder's kind, at its size; None for a kind that has none."""
    kinds, size = IMAGE_PROCESSOR_MAPPING.get(type(config), None), getattr(config, "image_size", None)
    return next(iter(kinds.values()))(size=size) if kinds and isinstance(size, int) else None


def weights_hash(model: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        total.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def drawn_size(model) -> int:
    """Pixels per side of frames drawn for an encoder, or a world model with one: what it takes; 64 where none is known.

    The same for slots, previews and evaluations: a world model is judged on such frames as its slots come from.
    """
    return _image_size(getattr(model, "slot_encoder", model)) or 64


def _image_size(model) -> int | None:
    """Pixels per side of the frames that a model takes, where its config says so."""
    size = getattr(getattr(model, "config", None), "image_size", None)
    return size if isinstance(size, int) else None


def _pixel_values(frames: np.ndarray, image_processor: Callable | None, model: torch.nn.Module) -> torch.Tensor:
    """uint8 [T, H, W, 3] -> float [T, 3, H', W'] on the CPU."""
    if image_processor is not None:
        pixels = torch.as_tensor(image_processor(frames, return_tensors="pt")["pixel_values"])
        return pixels.reshape(-1, *pixels.shape[-3:])
    size = _image_size(model)
    if size is not None and frames.shape[1:3] != (size, size):
        raise EncoderMismatch(
            f"frames are {frames.shape[1]} x {frames.shape[2]} pixels, the encoder takes {size} x {size}: pass its "
            f"image_processor, or render_resolution={size} if frames are drawn from states"
        )
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float().div_(255)


@torch.inference_mode()
def _forward(model: torch.nn.Module, pixels: torch.Tensor, *, keep_masks: bool = False, **start) -> dict:
    """pixels [B, T, 3, H, W] -> numpy slots float32 [B, T, N, D], masks [B, T, N, H', W'] if kept, and the state."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    kind, want = type(model).__name__, f"slots [{pixels.shape[0]}, {pixels.shape[1]}, N, D]"
    try:
        output = model(pixel_values=pixels.to(device), **start)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{kind} does not take pixel_values {tuple(pixels.shape)} ({error}); expected an encoder that returns {want}"
        ) from error
    slots, masks = getattr(output, "slots", None), getattr(output, "masks", None)
    if slots is None or slots.ndim != 4 or slots.shape[:2] != pixels.shape[:2]:
        returned = "no slots" if slots is None else f"slots {tuple(slots.shape)}"
        raise ValueError(f"the encoder returned {returned} for pixel_values {tuple(pixels.shape)}; expected {want}")
    if keep_masks and masks is None:
        raise ValueError(f"{type(model).__name__} returns no masks, which pictures of its slots need")
    return {
        "slots": slots.float().cpu().numpy(),
        "masks": masks.float().cpu().numpy() if keep_masks else None,
        "state": getattr(output, "state", None),
    }
