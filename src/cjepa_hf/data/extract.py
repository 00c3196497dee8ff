"""Frames to slots: runs a slot encoder over a dataset of episodes and writes a slot dataset (see `slots`)."""

import hashlib
import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel

from cjepa_hf.simulators.rendering import render_push_t

from .slots import METADATA_FILE, SlotDatasetWriter, _split_of, fingerprint, load_split, writer_arguments

__all__ = ["extract_slots"]

logger = logging.getLogger(__name__)

FRAME_COLUMNS = ("frames", "images")
COPIED_COLUMNS = ("actions", "proprio", "state", "contacts")
RENDERERS = {"push_t": render_push_t}  # by the `simulator` named in collection.json


def extract_slots(
    source: str | os.PathLike | datasets.DatasetDict,
    encoder: str | os.PathLike | torch.nn.Module,
    output_dir: str | os.PathLike,
    *,
    image_processor: Callable | None = None,
    splits: Sequence[str] | None = None,
    frame_skip: int = 5,
    dtype: str = "float32",
    batch_size: int = 64,
    device: str | torch.device | None = None,
    num_frames: int | None = None,
    render_resolution: int = 64,
    render_options: Mapping | None = None,
    source_revision: str | None = None,
    encoder_revision: str | None = None,
    frames_per_file: int = 16384,
    progress: bool = True,
) -> Path:
    """Encode every frame of `source` and write the slots, with the source's other columns, to `output_dir`.

    Run again with the same arguments after an interruption, it goes on after the last finished file; on a finished
    folder it returns at once.

    Args:
        source: folder, Hub id or `DatasetDict` with one row per episode: frames in a column `frames` or `images` (a
            list of images, or uint8 [T, H, W, 3] RGB), or a `state` column [T, 5 or more] that the simulator named in
            its `collection.json` can draw. `actions`, `proprio`, `state` and `contacts` [T, ...] are copied along.
        encoder: folder, Hub id or model whose `forward(pixel_values=[B, T, 3, H, W])` returns `.slots` [B, T, N, D],
            or a `CJepaModel` that holds one. If its config (or itself) says `memoryless = True`, frames of all episodes
            share batches; else one whole episode is encoded at a time, with a random seed made from its name.
        image_processor: turns uint8 frames [T, H, W, 3] into `pixel_values`. Default: the encoder's own where its
            folder has one, else pixels / 255.
        splits: names of the splits; default: all.
        frame_skip: suggested for windows, stored in the dataset.
        dtype: "float32" or "float16" of the stored slots.
        batch_size: frames per forward (memoryless encoders).
        device: default: where a given model is; CUDA if there is one for a loaded model.
        num_frames: stop each split after the episode that reaches this many frames.
        render_resolution: pixels per side of frames drawn from states.
        render_options: more arguments of the renderer, such as `{"goal_pose": None}`.
        source_revision, encoder_revision: branch, tag or commit on the Hub.
        frames_per_file: frames per Parquet file, which is also what an interruption can lose.
        progress: show a bar with the remaining time.

    Returns:
        `output_dir`. Damaged episodes (unreadable frames, NaN states, columns of unequal length, slots that are not
        finite) are left out, named in a warning at the end and listed under `skipped` in `slot_dataset.json`.

    Raises:
        FileExistsError: `output_dir` is a finished dataset made with other arguments.
        ValueError: the source has neither frames nor states that can be drawn, the encoder does not take its frames,
            other arguments than the interrupted run's, or no episode could be read.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, it is {batch_size}")
    name, collection, data = _open_source(source, source_revision, splits)
    model, image_processor, description = _open_encoder(encoder, encoder_revision, image_processor, device)
    memoryless = bool(getattr(model, "memoryless", getattr(getattr(model, "config", None), "memoryless", False)))
    frame_column, render = _frame_source(name, next(iter(data.values())).features, collection)
    content = {split: [list(_names(d, split)), _lengths(d, frame_column).tolist()] for split, d in data.items()}
    description_of_source = {
        "name": name,
        "revision": source_revision,
        "content": fingerprint([content, collection]),
        "splits": list(data),
        "num_frames": num_frames,
    }
    if render is not None:
        given = {"goal_pose": collection["goal_pose"]} if "goal_pose" in collection else {}
        render_options = {"resolution": render_resolution, **given, **(render_options or {})}
        description_of_source["render"] = render_options
    if image_processor is not None:
        processor = (
            image_processor.to_dict() if hasattr(image_processor, "to_dict") else type(image_processor).__name__
        )
        description["image_processor"] = fingerprint(processor)
    arguments = {
        "frame_skip": frame_skip,
        "encoder": description,
        "source": description_of_source,
        "fps": collection.get("fps"),
        "units": collection.get("units"),
        "dtype": dtype,
    }
    finished = Path(output_dir) / METADATA_FILE
    if finished.exists():
        made_with = json.loads(finished.read_text(encoding="utf-8")).get("fingerprint")
        if made_with == fingerprint(writer_arguments(**arguments)):
            logger.info("%s is complete: nothing to do", output_dir)
            return Path(output_dir)
    writer = SlotDatasetWriter(output_dir, frames_per_file=frames_per_file, **arguments)

    def draw(state: np.ndarray) -> np.ndarray:
        return render(state, **render_options)

    def preprocess(frames: np.ndarray) -> torch.Tensor:
        return _pixel_values(frames, image_processor, model)

    was_training = model.training
    model.eval()
    try:
        for split, rows in data.items():
            lengths = _lengths(rows, frame_column)
            ids, done = _names(rows, split), frozenset(writer.finished(split))
            wanted = (
                range(len(rows)) if num_frames is None else np.flatnonzero(np.cumsum(lengths) - lengths < num_frames)
            )
            todo = [int(row) for row in wanted if ids[row] not in done]
            bar = tqdm(total=int(lengths[todo].sum()), unit="frame", desc=f"slots of {split}", disable=not progress)
            damaged: list[dict] = []
            episodes = _read_episodes(
                rows, todo, ids, frame_column, None if render is None else draw, preprocess, damaged
            )
            encode = _encode_batches if memoryless else _encode_episodes
            for episode in encode(episodes, model, batch_size):
                try:
                    writer.write(split, episode)
                except ValueError as error:
                    damaged.append({"episode_id": episode["episode_id"], "reason": str(error)})
                bar.update(len(episode["slots"]))
            bar.close()
            writer.skipped += [{"split": split, **one} for one in damaged]
            if damaged and not writer.finished(split) and len(damaged) == len(todo):
                raise ValueError(
                    f"{name}: none of the {len(todo)} episodes of split {split!r} could be used; the first, "
                    f"{damaged[0]['episode_id']!r}: {damaged[0]['reason']}"
                )
    finally:
        model.train(was_training)
    if writer.skipped:
        listed = "; ".join(f"{s['split']} {s['episode_id']!r}: {s['reason']}" for s in writer.skipped[:10])
        more = f"; and {len(writer.skipped) - 10} more" if len(writer.skipped) > 10 else ""
        logger.warning(
            "%d damaged episodes of %s were left out (all are listed in %s): %s%s",
            len(writer.skipped), name, METADATA_FILE, listed, more,
        )  # fmt: skip
    return writer.close()


# --------------------------------------------------------------------------------------------------------------------
# Source


def _open_source(source, revision, splits) -> tuple[str, dict, dict[str, datasets.Dataset]]:
    """Name, content of collection.json ({} if there is none) and the wanted splits."""
    collection: dict = {}
    if isinstance(source, datasets.DatasetDict):
        name, available, load = "DatasetDict", list(source), source.__getitem__
    else:
        folder, name = Path(source), str(source)
        if folder.exists():
            name, path = folder.resolve().name, folder / "collection.json"
            if not path.exists() and (folder / ".collecting").exists():
                raise ValueError(f"{folder} is an interrupted collection: run the same collection again to finish it")
            available = list(dict.fromkeys(_split_of(p) for p in sorted(folder.glob("data/*-[0-9]*.parquet"))))
            available = available or datasets.get_dataset_split_names(str(folder))
            revision = None
        else:
            if name.count("/") != 1 or name.startswith((".", "/", "~")):
                raise FileNotFoundError(f"no folder {name}, and it is not a Hub id (owner/name) either")
            try:
                path = Path(hf_hub_download(name, "collection.json", repo_type="dataset", revision=revision))
            except EntryNotFoundError as error:
                if isinstance(error, FileNotFoundError):  # no connection and nothing cached
                    raise FileNotFoundError(f"no folder {name}, and the Hub could not be reached: {error}") from error
                path = None
            available = datasets.get_dataset_split_names(name, revision=revision)
        if path is not None and path.is_file():
            try:
                collection = json.loads(path.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(f"{path} is not valid json ({error}): collect the dataset again") from None

        def load(split):
            return load_split(str(source), split, revision=revision)

    missing = set(splits or ()) - set(available)
    if missing or not available:
        raise ValueError(f"{name} has no split {sorted(missing) or ''}; it has {available}")
    return name, collection, {split: load(split) for split in (splits or sorted(available, key=_train_first))}


def _train_first(split: str) -> tuple[bool, str]:
    return split != "train", split


def _frame_source(name: str, features: datasets.Features, collection: dict) -> tuple[str, Callable | None]:
    """The column the frames come from, and the renderer if it holds states."""
    for column in FRAME_COLUMNS:
        if column in features:
            shape = getattr(features[column], "shape", None)
            if shape is not None and (len(shape) != 4 or shape[-1] != 3):
                raise ValueError(
                    f"{name}: column {column!r} has the shape {tuple(shape)}; frames must be [T, H, W, 3], RGB"
                )
            return column, None
    simulator = collection.get("simulator")
    if "state" in features and simulator in RENDERERS:
        return "state", RENDERERS[simulator]
    if "state" in features:
        raise ValueError(
            f"{name} has no frames, and its states cannot be drawn: its collection.json names the simulator "
            f"{simulator!r}, known are {sorted(RENDERERS)}. Add a column 'frames'"
        )
    raise ValueError(
        f"{name} has columns {sorted(features)}: it needs 'frames' or 'images' (RGB frames), or the 'state' of a "
        f"collected dataset"
    )


def _names(data: datasets.Dataset, split: str) -> list[str]:
    names = data.with_format(None)["episode_id"][:] if "episode_id" in data.features else [None] * len(data)
    names = [name or f"{split}-{row:06d}" for row, name in enumerate(names)]
    if len(set(names)) < len(names):
        double = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"episode_id {double!r} occurs more than once in split {split!r}: rename one of the episodes")
    return names


def _lengths(data: datasets.Dataset, column: str) -> np.ndarray:
    """Frames of each episode, int64 [E], from the Arrow offsets."""
    chunks = [c.storage if isinstance(c, pa.ExtensionArray) else c for c in data.data.column(column).chunks]
    if not all(pa.types.is_list(c.type) or pa.types.is_large_list(c.type) for c in chunks):
        raise ValueError(f"column {column!r} must hold one list of frames per episode, it is {data.features[column]}")
    lengths = [pc.fill_null(pc.list_value_length(c), 0).to_numpy() for c in chunks]
    lengths = np.concatenate([np.zeros(0, np.int64), *lengths]).astype(np.int64)
    return lengths if data._indices is None else lengths[data._indices.column(0).to_numpy()]


def _read_episodes(
    data: datasets.Dataset,
    rows: Iterable[int],
    ids: Sequence[str],
    frame_column: str,
    draw: Callable | None,
    preprocess: Callable,
    damaged: list[dict],
) -> Iterator[tuple[dict, torch.Tensor]]:
    """(columns to copy, pixel values [T, 3, H, W]) of each readable episode; the others are added to `damaged`."""
    copied = [column for column in COPIED_COLUMNS if column in data.features]
    stored_as_bytes = getattr(data.features[frame_column], "dtype", None) == "uint8"
    data = data.select_columns(list(dict.fromkeys([frame_column, *copied]))).with_format("numpy")
    for row in rows:
        try:
            # Whatever goes wrong here, in a decoder or in our checks, is the fault of this row.
            values = data[row]
            episode = {"episode_id": ids[row]} | {column: np.asarray(values[column]) for column in copied}
            frames = values[frame_column]
            if stored_as_bytes:  # the numpy format turns every integer into int64
                frames = np.asarray(frames, np.uint8)
            frames = _checked_episode(frames, episode, is_state=draw is not None)
            pixels = preprocess(frames) if draw is None else None
        except Exception as error:
            damaged.append({"episode_id": str(ids[row]), "reason": f"{type(error).__name__}: {error}"})
            continue
        yield episode, preprocess(draw(frames)) if pixels is None else pixels


def _checked_episode(frames, episode: dict, *, is_state: bool) -> np.ndarray:
    if frames is None or not len(frames):
        raise ValueError("it has no frames")
    for column, values in episode.items():
        if column != "episode_id" and (values.ndim != 2 or len(values) != len(frames)):
            raise ValueError(f"{column} has the shape {values.shape} for {len(frames)} frames (NaN where unknown)")
    frames = np.asarray(frames)
    if is_state:
        if not np.isfinite(frames).all():
            raise ValueError(f"state is not finite at frame {np.flatnonzero(~np.isfinite(frames).all(1))[0]}")
    elif frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames must be uint8 [T, H, W, 3] RGB, these are {frames.dtype} {frames.shape}")
    return frames


# --------------------------------------------------------------------------------------------------------------------
# Encoder


def _open_encoder(encoder, revision, image_processor, device) -> tuple[torch.nn.Module, Callable | None, dict]:
    """Model on its device, image processor, and what the dataset records of them."""
    if isinstance(encoder, torch.nn.Module):
        model, name = encoder, getattr(getattr(encoder, "config", None), "name_or_path", "") or type(encoder).__name__
    else:
        name = str(encoder)
        # Slots are data: full precision, whatever the checkpoint was saved in. Pickled weights are refused.
        model = AutoModel.from_pretrained(name, revision=revision, dtype=torch.float32, use_safetensors=True)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
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
    if device is not None:
        model = model.to(device)
    config = model.config.to_dict() if hasattr(getattr(model, "config", None), "to_dict") else {}
    volatile = ("transformers_version", "_name_or_path", "name_or_path", "dtype", "torch_dtype", "architectures")
    description = {
        # a folder's name without its place: datasets are published
        "name": Path(name).resolve().name if Path(name).is_dir() else name,
        "revision": getattr(getattr(model, "config", None), "_commit_hash", None) or revision,
        "config_hash": fingerprint({k: v for k, v in config.items() if k not in volatile and k != "_commit_hash"}),
        "weights_hash": _weights_hash(model),
    }
    return model, image_processor, description


def _weights_hash(model: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        total.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def _pixel_values(frames: np.ndarray, image_processor: Callable | None, model: torch.nn.Module) -> torch.Tensor:
    """uint8 [T, H, W, 3] -> float [T, 3, H', W'] on the CPU."""
    if image_processor is not None:
        pixels = torch.as_tensor(image_processor(frames, return_tensors="pt")["pixel_values"])
        return pixels.reshape(-1, *pixels.shape[-3:])
    size = getattr(getattr(model, "config", None), "image_size", None)
    if isinstance(size, int) and frames.shape[1:3] != (size, size):
        raise ValueError(
            f"frames are {frames.shape[1]} x {frames.shape[2]} pixels, the encoder takes {size} x {size}: pass its "
            f"image_processor, or render_resolution={size} if frames are drawn from states"
        )
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float().div_(255)


@torch.inference_mode()
def _forward(model: torch.nn.Module, pixels: torch.Tensor) -> np.ndarray:
    """pixels [B, T, 3, H, W] -> slots float32 [B, T, N, D]."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    slots = model(pixel_values=pixels.to(device)).slots
    if slots.ndim != 4 or slots.shape[:2] != pixels.shape[:2]:
        raise ValueError(
            f"the encoder returned slots {tuple(slots.shape)} for pixel_values {tuple(pixels.shape)}; expected "
            f"[{pixels.shape[0]}, {pixels.shape[1]}, N, D]"
        )
    return slots.float().cpu().numpy()


def _encode_episodes(episodes: Iterable[tuple[dict, torch.Tensor]], model, batch_size: int) -> Iterator[dict]:
    """One whole episode at a time, for encoders that carry slots from frame to frame."""
    for episode, pixels in episodes:
        # Some of these start from random slots: seeded by name, an episode gets the same ones in every run.
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(episode["episode_id"].encode()))
            slots = _forward(model, pixels[None])[0]
        yield episode | {"slots": slots}


def _encode_batches(episodes: Iterable[tuple[dict, torch.Tensor]], model, batch_size: int) -> Iterator[dict]:
    """Batches of `batch_size` single frames, across the borders of episodes."""
    waiting: list[tuple[dict, int]] = []  # episodes whose last frames are not encoded yet
    frames, slots = [], []

    def encode(count: int) -> Iterator[dict]:
        pixels = torch.cat(frames)
        slots.extend(_forward(model, part[:, None])[:, 0] for part in pixels[:count].split(batch_size))
        frames[:] = [pixels[count:]]
        done = np.concatenate(slots)
        while waiting and waiting[0][1] <= len(done):
            episode, length = waiting.pop(0)
            yield episode | {"slots": done[:length]}
            done = done[length:]
        slots[:] = [done]

    for episode, pixels in episodes:
        waiting.append((episode, len(pixels)))
        frames.append(pixels)
        count = sum(map(len, frames))
        if count >= batch_size:
            yield from encode(count - count % batch_size)
    if waiting:
        yield from encode(sum(map(len, frames)))
