"""Slot datasets: the schema, a resumable writer, a checked loader, and windows for training.

**Schema (version 1).** A slot dataset is a folder (or a dataset repository of the Hub) that `datasets.load_dataset`
reads, with one row per episode of T frames:

| column | feature | content |
|---|---|---|
| `episode_id` | string | unique name of the episode |
| `slots` | `Array3D((None, N, D), "float32" or "float16")` | slots [T, N, D], finite |
| `actions` | `Array2D((None, A), "float32")`, optional | action t is taken at frame t; NaN = unknown (the last row: nothing followed) |
| `proprio` | `Array2D((None, P), "float32")`, optional | the robot's own state, raw units, NaN = unknown |
| `state` | `Array2D((None, S), "float32")`, optional | the simulator's state, for evaluation only |
| `contacts` | `Array2D((None, C), "bool")`, optional | contacts during the step after frame t |

All columns of a row have the same T. The files are `data/<split>-00000-of-00007.parquet`, a `README.md` whose YAML
`configs` name the splits, and `slot_dataset.json` at the root:
`schema_version`, `num_slots` N, `slot_size` D, `dtype`, `frame_skip` (suggested for windows), `fps` (or null),
`encoder` (`name`, `revision`, `config_hash`, ...), `source`, `units` (per column), `columns` (width of each optional
column), `splits` (`num_episodes`, `num_frames` of each), `statistics` (see below), `skipped` (damaged episodes that
were left out, with the reason) and `fingerprint` (of the arguments it was made with). This file is written last: a
folder without it is incomplete and is refused.

`statistics` holds `action_mean`, `action_std` [A] and `proprio_mean`, `proprio_std` [P]: per raw column, over the
frames of the training split only, NaN left out. Training normalizes whole action blocks and uses
[`window_statistics`], which has one value per column of the block.

**Windows.** A window is `history_length + prediction_length` = n steps of `frame_skip` frames. Start s is valid if
s + n * frame_skip <= T. Slots, proprio and state are taken at s + i * frame_skip; step i of the actions is the
concatenation of the actions of frames s + i * frame_skip ... s + (i + 1) * frame_skip - 1 (paper, Push-T setting).
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Array2D, Array3D, Features, Value, load_dataset
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

__all__ = [
    "METADATA_FILE",
    "SCHEMA_VERSION",
    "SlotDataset",
    "SlotDatasetWriter",
    "SlotWindows",
    "StreamingSlotWindows",
    "load_slot_dataset",
    "normalize_windows",
    "window_statistics",
    "write_slot_dataset",
]

SCHEMA_VERSION = 1
METADATA_FILE = "slot_dataset.json"
# Everything unfinished lives in this hidden folder, which `load_dataset` never reads.
PARTIAL_FOLDER = ".partial"
PREVIEW_FOLDER = "preview"  # pictures of masks, see `cjepa_hf.evaluation.preview`
FLOAT_COLUMNS = ("actions", "proprio", "state")
WINDOW_COLUMNS = ("slots", "actions", "proprio")


# --------------------------------------------------------------------------------------------------------------------
# Arrow buffers as numpy views


class _FrameColumn:
    """One column of per-frame arrays, as numpy views of the Arrow buffers of every chunk (nothing is copied).

    `frames[c]` is [frames of chunk c, *shape]; row r of the table is `frames[chunk[r]][first[r] : first[r] + length[r]]`.
    """

    def __init__(self, column: pa.ChunkedArray, shape: Sequence[int], name: str):
        self.frames: list[np.ndarray] = []
        chunk, first, length = [], [], []
        for array in column.chunks:
            array = array.storage if isinstance(array, pa.ExtensionArray) else array
            if len(array) == 0:
                continue
            if array.null_count:
                row = sum(map(len, length)) + int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
                raise ValueError(f"column {name!r} has no value in row {row}: give every episode this column or none")
            rows = array.offsets.to_numpy()
            lo, hi, values = int(rows[0]), int(rows[-1]), array.values
            for size in shape:
                offsets = values.offsets.to_numpy()[lo : hi + 1]
                if values.null_count or (np.diff(offsets) != size).any():
                    raise ValueError(
                        f"column {name!r} holds frames that are not of shape {tuple(shape)}: rewrite the dataset, "
                        f"every frame must have the same shape"
                    )
                lo, hi, values = int(offsets[0]), int(offsets[-1]), values.values
            values = values.slice(lo, hi - lo)
            if values.null_count:
                raise ValueError(f"column {name!r} holds nulls: write NaN for unknown numbers")
            # bool is packed in bits, every other type is viewed in place
            flat = values.to_numpy(zero_copy_only=not pa.types.is_boolean(values.type))
            chunk.append(np.full(len(array), len(self.frames), np.int64))
            first.append(rows[:-1].astype(np.int64) - int(rows[0]))
            length.append(np.diff(rows).astype(np.int64))
            self.frames.append(flat.reshape(-1, *shape))
        self.shape = tuple(shape)
        self.chunk, self.first, self.length = (
            np.concatenate(x) if x else np.zeros(0, np.int64) for x in (chunk, first, length)
        )

    def select(self, rows: np.ndarray) -> None:
        self.chunk, self.first, self.length = self.chunk[rows], self.first[rows], self.length[rows]

    def gather(self, episodes: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """Frames `frames` [B, T] (counted inside their episode) of `episodes` [B], as float32 [B, T, *shape]."""
        rows, chunk = self.first[episodes][:, None] + frames, self.chunk[episodes]
        out = np.empty((*rows.shape, *self.shape), np.float32)
        order = np.argsort(chunk, kind="stable")
        rows, chunk = rows[order], chunk[order]
        bounds = [0, *(np.flatnonzero(np.diff(chunk)) + 1).tolist(), len(rows)]
        for start, stop in itertools.pairwise(bounds):
            source = self.frames[chunk[start]]
            if source.dtype == np.float32:
                # rows are inside the chunk by construction; "clip" lets `take` write to `out` without a buffer
                source.take(rows[start:stop], axis=0, out=out[start:stop], mode="clip")
            else:
                out[start:stop] = source[rows[start:stop]]
        if len(bounds) == 2:
            return out
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return out.take(back, axis=0)


def frame_columns(data: datasets.Dataset, names: Iterable[str]) -> dict[str, _FrameColumn]:
    """Frame columns of a map-style dataset, in the order of its rows (also after select, shuffle, concatenate)."""
    columns = {}
    for name in names:
        feature = data.features[name]
        column = _FrameColumn(data.data.column(name), feature.shape[1:], name)
        if data._indices is not None:
            column.select(data._indices.column(0).to_numpy())
        columns[name] = column
    return columns


# --------------------------------------------------------------------------------------------------------------------
# Loading and checking


class SlotDataset:
    """One split of a slot dataset: `data` (a `datasets` dataset) with its checked `metadata`.

    Args:
        data: a `datasets.Dataset` (indexable) or `datasets.IterableDataset` (streamed) that follows the schema.
        metadata: content of `slot_dataset.json`; None for a dataset made in memory.
        name: what errors call this dataset.
        check_values: also read every slot once and refuse NaN and infinity (streamed datasets are checked episode by
            episode while they are read).

    Attributes:
        num_slots, slot_size, frame_skip (None if unknown), statistics (dict, may be empty), columns (of the schema,
        present here).

    Raises:
        ValueError: a missing or misshapen column, columns of unequal length, slots that are not finite, or metadata
            that contradict the data. The message names the column and the episode.
    """

    def __init__(
        self,
        data: datasets.Dataset | datasets.IterableDataset,
        metadata: Mapping | None = None,
        *,
        name: str = "slot dataset",
        check_values: bool = True,
    ):
        self.data, self.name = data, name
        self.metadata = dict(metadata or {})
        self.streaming = isinstance(data, datasets.IterableDataset)
        if data.features is None and self.streaming:
            self.data = data = data._resolve_features()
        self.columns = _check_features(data.features, name)
        self.num_slots, self.slot_size = data.features["slots"].shape[1:]
        for key, value in (("num_slots", self.num_slots), ("slot_size", self.slot_size)):
            if self.metadata.get(key, value) != value:
                raise ValueError(
                    f"{name}: {METADATA_FILE} says {key}={self.metadata[key]}, column 'slots' has {value}. "
                    f"The files do not belong together: extract the dataset again"
                )
        self.frame_skip = self.metadata.get("frame_skip")
        self.statistics = self.metadata.get("statistics", {})
        if not self.streaming:
            self._check_episodes(check_values)

    def __len__(self) -> int:
        """Number of episodes."""
        if self.streaming:
            raise TypeError(f"{self.name} is streamed: its length is unknown. Load it with streaming=False")
        return len(self.data)

    def __repr__(self) -> str:
        size = "streamed" if self.streaming else f"{len(self)} episodes, {int(self.lengths.sum())} frames"
        return f"SlotDataset({self.name}: {size}, slots [{self.num_slots}, {self.slot_size}], columns {self.columns})"

    @property
    def lengths(self) -> np.ndarray:
        """Frames of each episode, int64 [E] (not for a streamed dataset)."""
        if self.streaming:
            raise TypeError(f"{self.name} is streamed: its lengths are unknown. Load it with streaming=False")
        return self._lengths

    def episode_id(self, index: int) -> str:
        return self.data.with_format(None)[index]["episode_id"]

    def select(self, indices: Iterable[int]) -> "SlotDataset":
        """The episodes `indices`, in that order."""
        data = self.data.select(indices)
        return SlotDataset(data, self.metadata, name=self.name, check_values=False)

    def _check_episodes(self, check_values: bool) -> None:
        try:
            columns = frame_columns(self.data, self.columns)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        self._lengths = columns["slots"].length
        for name, column in columns.items():
            different = np.flatnonzero(column.length != self._lengths)
            if different.size:
                row = int(different[0])
                raise ValueError(
                    f"{self.name}: episode {self.episode_id(row)!r} has {self._lengths[row]} frames of slots but "
                    f"{column.length[row]} of {name!r}. Every column needs one entry per frame (NaN where unknown)"
                )
        for name in ("slots", "actions", "proprio") if check_values else ():
            if name in columns:
                self._check_values(name, columns[name])

    def _check_values(self, name: str, column: _FrameColumn) -> None:
        """Refuse slots that are not finite, and infinite actions and proprioception (NaN there means unknown)."""
        for number, frames in enumerate(column.frames):
            for start in range(0, len(frames), 4096):
                block = frames[start : start + 4096]
                wrong = ~np.isfinite(block) if name == "slots" else np.isinf(block)
                if not wrong.any():
                    continue
                bad = start + int(np.flatnonzero(wrong.reshape(len(block), -1).any(axis=1))[0])
                here = (column.chunk == number) & (column.first <= bad) & (bad < column.first + column.length)
                if here.any():  # else it is a row that `select` left out
                    row = int(np.flatnonzero(here)[0])
                    raise ValueError(
                        f"{self.name}: {name} of episode {self.episode_id(row)!r} are not finite at frame "
                        f"{bad - int(column.first[row])}. Remove the episode or extract it again"
                    )


def _check_features(features: Features | None, name: str) -> list[str]:
    """Check the features against the schema; return the frame columns that are present."""
    features = features or {}
    expected = {"episode_id": "a string", "slots": 'Array3D((None, N, D), "float32" or "float16")'}
    for column, what in expected.items():
        if column not in features:
            raise ValueError(
                f"{name}: no column {column!r} ({what}); it has {sorted(features)}. Slot datasets are made by "
                f"`cjepa-hf extract` or cjepa_hf.data.SlotDatasetWriter"
            )
    if getattr(features["episode_id"], "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"{name}: column 'episode_id' must be a string, it is {features['episode_id']}")
    slots = features["slots"]
    if not isinstance(slots, Array3D) or slots.dtype not in ("float32", "float16"):
        raise ValueError(f"{name}: column 'slots' must be {expected['slots']}, it is {slots}")
    for column in FLOAT_COLUMNS:
        feature = features.get(column)
        if feature is not None and not (isinstance(feature, Array2D) and feature.dtype.startswith("float")):
            raise ValueError(f'{name}: column {column!r} must be Array2D((None, size), "float32"), it is {feature}')
    contacts = features.get("contacts")
    if contacts is not None and not (isinstance(contacts, Array2D) and contacts.dtype == "bool"):
        raise ValueError(f"{name}: column 'contacts' must be Array2D((None, size), \"bool\"), it is {contacts}")
    return [column for column in ("slots", *FLOAT_COLUMNS, "contacts") if column in features]


def _read_metadata(path: Path, name: str) -> dict:
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{name}: {METADATA_FILE} is not valid json ({error}). Extract the dataset again") from None
    version = metadata.get("schema_version") if isinstance(metadata, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{name}: {METADATA_FILE} has schema_version {version!r}, this library reads {SCHEMA_VERSION}. "
            f"Update cjepa-hf, or extract the dataset again"
        )
    missing = {"num_slots", "slot_size", "frame_skip", "encoder", "splits", "statistics"} - set(metadata)
    if missing:
        raise ValueError(f"{name}: {METADATA_FILE} lacks {sorted(missing)}. Extract the dataset again")
    return metadata


def load_slot_dataset(
    source: str | os.PathLike,
    split: str = "train",
    *,
    revision: str | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
    check_values: bool = True,
) -> SlotDataset:
    """Load and check one split of a slot dataset.

    Args:
        source: local folder, or id of a dataset repository on the Hub.
        split: name of the split.
        revision: branch, tag or commit on the Hub.
        streaming: do not download or convert, read episodes as they come (use [`StreamingSlotWindows`]).
        cache_dir: where `datasets` keeps its memory-mapped copy (default: its usual cache).
        check_values: read every slot once and refuse NaN and infinity.

    Raises:
        FileNotFoundError: there is no such folder or repository.
        ValueError: the dataset is incomplete, damaged or does not follow the schema.
    """
    folder, name = Path(source), str(source)
    if folder.exists():
        metadata_path = folder / METADATA_FILE
        if not metadata_path.is_file():
            if (folder / PARTIAL_FOLDER).is_dir():
                raise ValueError(
                    f"{name} is incomplete: its extraction was interrupted. Run the same command again, with the same "
                    f"output folder: it goes on after the last finished file"
                )
            raise ValueError(
                f"{name} is not a slot dataset: it has no {METADATA_FILE}. Make one with `cjepa-hf extract`"
            )
        check_local_files(folder)
        source, revision = str(folder), None
    else:
        source = name
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise FileNotFoundError(f"no folder {name}, and it is not a Hub id (owner/name) either")
        try:
            metadata_path = Path(
                hf_hub_download(source, METADATA_FILE, repo_type="dataset", revision=revision, cache_dir=None)
            )
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"no folder {name} and no dataset {name} on the Hub that you can read: check the name, or log in with "
                f"`hf auth login` for a private one"
            ) from error
        except EntryNotFoundError as error:
            if isinstance(error, FileNotFoundError):  # LocalEntryNotFoundError: no connection and nothing cached
                raise FileNotFoundError(f"no folder {name}, and the Hub could not be reached: {error}") from error
            raise ValueError(
                f"{name} is not a slot dataset: it has no {METADATA_FILE}. Make one with `cjepa-hf extract`"
            ) from error
    metadata = _read_metadata(metadata_path, name)
    if split not in metadata["splits"]:
        raise ValueError(f"{name} has no split {split!r}; it has {sorted(metadata['splits'])}")
    try:
        data = load_split(source, split, revision=revision, streaming=streaming, cache_dir=cache_dir)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowInvalid, ValueError) as error:
        raise ValueError(
            f"{name}: split {split!r} could not be read ({error.__cause__ or error}). A file is damaged: download or "
            f"extract the dataset again"
        ) from error
    dataset = SlotDataset(data, metadata, name=f"{name} [{split}]", check_values=check_values)
    if not streaming:
        expected = metadata["splits"][split]
        found = {"num_episodes": len(dataset), "num_frames": int(dataset.lengths.sum())}
        for key, value in found.items():
            if expected.get(key, value) != value:
                raise ValueError(
                    f"{name}: split {split!r} has {key} {value}, {METADATA_FILE} says {expected[key]}. A file is "
                    f"missing or was added: download or extract the dataset again"
                )
    return dataset


def load_split(source: str, split: str, **arguments) -> datasets.Dataset | datasets.IterableDataset:
    """`load_dataset` of one split, never from a stale cache.

    The cache of a local folder whose card names the files is keyed by the folder's path alone: made anew, the folder
    would give the old rows. Files passed explicitly are keyed by their modification times.
    """
    if any(Path(source).glob(f"data/{split}-*.parquet")):
        arguments["data_files"] = {split: f"data/{split}-*.parquet"}
    return load_dataset(source, split=split, **arguments)


def check_local_files(folder: Path) -> None:
    """A truncated Parquet file is named here: `load_dataset` would only say that generation failed."""
    for path in sorted((folder / "data").glob("*.parquet")):
        try:
            pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}). Download it again or extract the dataset again") from None


# --------------------------------------------------------------------------------------------------------------------
# Writing


class SlotDatasetWriter:
    """Writes a slot dataset episode by episode; a killed run goes on after its last finished file.

    Finished Parquet files wait in a hidden folder and appear together in `close`, which also computes the statistics
    and writes `README.md` and, last, `slot_dataset.json`. Memory: at most one file's frames per split.

    Args:
        output_dir: new or empty folder, or one that a run with the same arguments left unfinished.
        frame_skip: suggested number of frames per window step.
        encoder: `{"name", "revision", "config_hash", ...}` of the encoder that made the slots.
        source: what the slots were made from (any json value).
        fps: frames per second, None if unknown.
        units: unit of each column.
        dtype: "float32" or "float16" (slots only).
        frames_per_file: a Parquet file is closed as soon as it holds this many frames.

    Raises:
        FileExistsError: the folder is a finished dataset.
        ValueError: it holds something else, or an unfinished dataset made with other arguments.

    Example:
        >>> writer = SlotDatasetWriter("my_slots", frame_skip=5)
        >>> for episode in episodes:  # {"episode_id": str, "slots": [T, N, D], "actions": [T, A], ...}
        ...     if episode["episode_id"] not in writer.finished("train"):
        ...         writer.write("train", episode)
        >>> writer.close()
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        *,
        frame_skip: int,
        encoder: Mapping | None = None,
        source=None,
        fps: float | None = None,
        units: Mapping[str, str] | None = None,
        dtype: str = "float32",
        frames_per_file: int = 16384,
    ):
        self.output_dir, self.dtype, self.frames_per_file = Path(output_dir), dtype, frames_per_file
        self.arguments = writer_arguments(frame_skip, encoder, source, fps, units, dtype)
        self.fingerprint = fingerprint(self.arguments)
        self.skipped: list[dict] = []
        self._features: Features | None = None
        self._waiting: dict[str, list[dict]] = {}
        self._finished: dict[str, set[str]] = {}
        self._open()

    def _open(self) -> None:
        partial = self.output_dir / PARTIAL_FOLDER
        if (self.output_dir / METADATA_FILE).exists():
            raise FileExistsError(f"{self.output_dir} is a finished dataset: choose another folder, or remove it")
        arguments_path = partial / "arguments.json"
        if arguments_path.exists():
            before = json.loads(arguments_path.read_text(encoding="utf-8"))
            if before != self.arguments:
                different = [
                    f"{key}: {before.get(key)!r} then, {self.arguments.get(key)!r} now"
                    for key in sorted(set(before) | set(self.arguments))
                    if before.get(key) != self.arguments.get(key)
                ]
                raise ValueError(
                    f"{self.output_dir} holds an unfinished dataset that was made with other arguments "
                    f"({'; '.join(different)}). Repeat those arguments to go on, or choose another folder"
                )
        elif self.output_dir.exists() and any(
            p.name not in (PARTIAL_FOLDER, PREVIEW_FOLDER) for p in self.output_dir.iterdir()
        ):
            raise ValueError(f"{self.output_dir} is not empty and not an unfinished slot dataset: choose a new folder")
        else:
            partial.mkdir(parents=True, exist_ok=True)
            write_text(arguments_path, json.dumps(self.arguments, indent=1))
        # `close` moves the whole folder in one step, so the files are in exactly one of the two places.
        moved = (self.output_dir / "data").exists()
        self._data = self.output_dir / "data" if moved else partial / "data"
        self._data.mkdir(exist_ok=True)
        self._read_finished()

    def _read_finished(self) -> None:
        self._finished = {}
        for path in self._files():
            names = pq.read_table(path, columns=["episode_id"]).column("episode_id").to_pylist()
            self._finished.setdefault(split_of(path), set()).update(names)
            self._features = Features.from_arrow_schema(pq.read_schema(path))

    def _files(self, split: str | None = None) -> list[Path]:
        return sorted(p for p in self._data.glob("*.parquet") if split is None or split_of(p) == split)

    def finished(self, split: str) -> set[str]:
        """Names of the episodes of `split` in finished files; a resumed run leaves these out."""
        return self._finished.get(split, set())

    def write(self, split: str, episode: Mapping) -> None:
        """Add one episode: `episode_id`, `slots` [T, N, D] and, the same in every episode, the optional columns.

        Raises:
            ValueError: a column is missing, misshapen or of another length, slots are not finite, the name was used.
                Nothing of the episode is kept; the writer can go on.
        """
        _check_split_name(split)
        waiting, name = self._waiting.get(split, []), episode.get("episode_id")
        if name in self.finished(split) or any(name == other["episode_id"] for other in waiting):
            raise ValueError(f"episode {name!r} was written before: episode_id must be unique in its split")
        episode = self._checked(episode)
        self._waiting.setdefault(split, []).append(episode)
        if sum(len(e["slots"]) for e in self._waiting[split]) >= self.frames_per_file:
            self._flush(split)

    def _checked(self, episode: Mapping) -> dict:
        name = episode.get("episode_id")
        if not isinstance(name, str) or not name:
            raise ValueError(f"episode_id must be a non-empty string, it is {name!r}")
        unknown = set(episode) - {"episode_id", "slots", *FLOAT_COLUMNS, "contacts"}
        if unknown or "slots" not in episode:
            raise ValueError(f"episode {name!r}: columns {sorted(episode)} do not follow the schema of slot datasets")
        arrays = {}
        for column, value in episode.items():
            if column == "episode_id":
                continue
            dtype = {"slots": self.dtype, "contacts": "bool"}.get(column, "float32")
            value = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
            if value.ndim != (3 if column == "slots" else 2):
                what = "[T, N, D]" if column == "slots" else "[T, size]"
                raise ValueError(f"episode {name!r}: {column} must be {what}, its shape is {value.shape}")
            with np.errstate(over="ignore"):
                value = np.ascontiguousarray(value, dtype=dtype)
            if len(value) != len(episode["slots"]):
                raise ValueError(
                    f"episode {name!r}: {len(value)} frames of {column}, {len(episode['slots'])} of slots. Every "
                    f"column needs one entry per frame (NaN where unknown)"
                )
            if column == "slots" and not np.isfinite(value).all():
                raise ValueError(f"episode {name!r}: slots are not finite as {dtype}")
            if column in ("actions", "proprio") and np.isinf(value).any():
                raise ValueError(f"episode {name!r}: {column} hold an infinity; write NaN for unknown numbers")
            arrays[column] = value
        if not len(arrays["slots"]):
            raise ValueError(f"episode {name!r} has no frames")
        features = _features({column: value.shape[1:] for column, value in arrays.items()}, self.dtype)
        if self._features is None:
            self._features = features
        elif features != self._features:
            raise ValueError(
                f"episode {name!r} has columns {dict(features)}, the episodes before it {dict(self._features)}"
            )
        return {"episode_id": name, **arrays}

    def _flush(self, split: str) -> None:
        episodes = self._waiting.get(split)
        if episodes:
            self._write(self._data / f"{split}-{len(self._files(split)):05d}.parquet", episodes)
            self._finished.setdefault(split, set()).update(e["episode_id"] for e in episodes)
            self._waiting[split] = []

    def write_file(
        self, split: str, number: int, episodes: Iterable[Mapping], skipped: Sequence[Mapping] = ()
    ) -> None:
        """Write the whole file `number` of `split` at once; several processes may write different files.

        Args:
            episodes: as [`write`] takes them. Those that are refused are added to `skipped`.
            skipped: `{"episode_id", "reason"}` of the episodes that belong here but are damaged.
        """
        _check_split_name(split)
        good, skipped = [], list(skipped)
        for episode in episodes:
            try:
                good.append(self._checked(episode))
            except ValueError as error:
                skipped.append({"episode_id": episode["episode_id"], "reason": str(error)})
        if good:
            self._write(self._data / f"{split}-{number:05d}.parquet", good)
        # Last: this file says that the other one is complete.
        listed = {"skipped": [{"split": split, **one} for one in skipped], "episodes": len(good)}
        write_text(self._note(split, number), json.dumps(listed))

    def has_file(self, split: str, number: int) -> bool:
        """Whether [`write_file`] has written this file (here or in another process, now or before an interruption)."""
        return self._note(split, number).exists()

    def _note(self, split: str, number: int) -> Path:
        return self.output_dir / PARTIAL_FOLDER / f"{split}-{number:05d}.json"

    def retry_damaged(self) -> None:
        """Forget the files of which nothing could be used, so that the next run tries them again."""
        for note in (self.output_dir / PARTIAL_FOLDER).glob("*-[0-9]*.json"):
            if not json.loads(note.read_text(encoding="utf-8"))["episodes"]:
                note.unlink()

    def _write(self, path: Path, episodes: list[dict]) -> None:
        schema = self._features.arrow_schema
        columns = [
            pa.array([e["episode_id"] for e in episodes], pa.string())
            if field.name == "episode_id"
            else pa.ExtensionArray.from_storage(field.type, _nested([e[field.name] for e in episodes]))
            for field in schema
        ]
        table = pa.table(columns, schema=schema)
        row_bytes = table.nbytes / len(episodes)
        temporary = path.with_suffix(".tmp")
        try:
            # Row groups of about 32 MB: what a reader that streams holds at once. Slots do not repeat: no dictionary.
            pq.write_table(
                table, temporary, row_group_size=max(1, int(2**25 / row_bytes)), use_dictionary=False, version="2.6"
            )
            _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def close(self) -> Path:
        """Write what waits, the statistics, the card and the metadata; the dataset is complete afterwards."""
        for split in list(self._waiting):
            self._flush(split)
        for path in self._data.glob("*.tmp"):  # of a process that was killed
            path.unlink()
        for note in sorted((self.output_dir / PARTIAL_FOLDER).glob("*-[0-9]*.json")):
            self.skipped += json.loads(note.read_text(encoding="utf-8"))["skipped"]
        self._read_finished()
        splits = sorted(self._finished, key=lambda split: (split != "train", split))
        if not splits:
            raise ValueError(f"no episode was written to {self.output_dir}: nothing to finish")
        counts = {}
        for split in splits:
            files = self._files(split)
            for number, path in enumerate(files):
                os.replace(path, path.with_name(f"{split}-{number:05d}-of-{len(files):05d}.parquet"))
            frames = sum(
                int(_FrameColumn(column, self._features["slots"].shape[1:], "slots").length.sum())
                for column in _row_groups(self._files(split), "slots")
            )
            counts[split] = {"num_episodes": len(self._finished[split]), "num_frames": frames}
        statistics = {}
        for column, key in (("actions", "action"), ("proprio", "proprio")):
            if "train" in counts and column in self._features:
                size = self._features[column].shape[1]
                chunks = (
                    chunk
                    for array in _row_groups(self._files("train"), column)
                    for chunk in _by_chunk(_FrameColumn(array, (size,), column))
                )
                statistics |= _block_statistics(chunks, key, 1, 1, size)
        metadata = {
            "schema_version": SCHEMA_VERSION,
            "num_slots": self._features["slots"].shape[1],
            "slot_size": self._features["slots"].shape[2],
            **self.arguments,
            "columns": {c: f.shape[1] for c, f in self._features.items() if c not in ("episode_id", "slots")},
            "splits": counts,
            "statistics": {key: value.tolist() for key, value in statistics.items()},
            "skipped": self.skipped,
            "fingerprint": self.fingerprint,
        }
        if self._data.parent != self.output_dir:
            os.rename(self._data, self.output_dir / "data")
            self._data = self.output_dir / "data"
        write_text(self.output_dir / "README.md", _card(metadata, self.output_dir))
        write_text(self.output_dir / METADATA_FILE, json.dumps(metadata, indent=1) + "\n")
        shutil.rmtree(self.output_dir / PARTIAL_FOLDER)
        return self.output_dir


def write_slot_dataset(output_dir: str | os.PathLike, splits: Mapping[str, Iterable[Mapping]], **arguments) -> Path:
    """Write whole splits: `splits` maps each name to an iterable of episodes, `arguments` as [`SlotDatasetWriter`].

    Called again after an interruption, with the same arguments, it leaves out the episodes that are already written.
    """
    writer = SlotDatasetWriter(output_dir, **arguments)
    for split, episodes in splits.items():
        done = frozenset(writer.finished(split))
        for episode in episodes:
            if episode.get("episode_id") not in done:
                writer.write(split, episode)
    return writer.close()


def writer_arguments(frame_skip, encoder=None, source=None, fps=None, units=None, dtype="float32") -> dict:
    """The arguments of a [`SlotDatasetWriter`] that must be the same when it resumes, checked, as json values."""
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype {dtype!r} is not one of 'float32', 'float16'")
    if not isinstance(frame_skip, int) or frame_skip < 1:
        raise ValueError(f"frame_skip must be an integer of at least 1, it is {frame_skip!r}")
    arguments = {
        "frame_skip": frame_skip,
        "encoder": {"name": None, "revision": None, "config_hash": None} | dict(encoder or {}),
        "source": source,
        "fps": fps,
        "units": dict(units or {}),
        "dtype": dtype,
    }
    return json.loads(json.dumps(arguments))


def is_finished(output_dir: Path, arguments: Mapping) -> bool:
    """Whether a folder holds the finished dataset that a writer with `arguments` would make; `FileExistsError` if it holds
    another one."""
    if not (output_dir / METADATA_FILE).is_file():
        return False
    there = _read_metadata(output_dir / METADATA_FILE, str(output_dir))
    if any(there.get(name) != value for name, value in writer_arguments(**arguments).items()):
        raise FileExistsError(f"{output_dir} is a finished dataset made with other arguments: choose another folder")
    return True


def _check_split_name(split: str) -> None:
    if not re.fullmatch(r"\w+(\.\w+)*", split):
        raise ValueError(f"split {split!r} is not a name that `datasets` accepts: use letters, digits and _")


def fingerprint(value) -> str:
    """Short hash of a json value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _features(shapes: Mapping[str, tuple[int, ...]], slots_dtype: str) -> Features:
    features = {"episode_id": Value("string"), "slots": Array3D((None, *shapes["slots"]), slots_dtype)}
    for column in (*FLOAT_COLUMNS, "contacts"):
        if column in shapes:
            features[column] = Array2D((None, *shapes[column]), "bool" if column == "contacts" else "float32")
    return Features(features)


def _nested(arrays: list[np.ndarray]) -> pa.ListArray:
    """Arrays [T_e, ...] as nested Arrow lists: one copy, where `datasets` would go through Python lists."""
    lengths = [len(a) for a in arrays]
    frames = np.concatenate(arrays)
    values = pa.array(frames.reshape(-1))
    for size in frames.shape[:0:-1]:
        values = pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, size, dtype=np.int32)), values)
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)), values)


def split_of(path: Path) -> str:
    return re.fullmatch(r"(.+?)-\d{5}(-of-\d{5})?", path.stem).group(1)


def _row_groups(paths: list[Path], column: str) -> Iterator[pa.ChunkedArray]:
    for path in paths:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=[column]).column(column)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_text(path: str | Path, text: str) -> None:
    """Writes a file in one move: under a temporary name beside it, then renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _card(metadata: dict, folder: Path) -> str:
    name = folder.resolve().name
    pictures = sorted((folder / PREVIEW_FOLDER).glob("*.png"))
    masks = "".join(f"![{path.stem}]({PREVIEW_FOLDER}/{quote(path.name)})\n" for path in pictures)
    masks = f"\nFrames, and the slot that has most of each pixel:\n\n{masks}" if masks else ""
    left_out = (
        f"\n{len(metadata['skipped'])} episodes were left out (`skipped` in {METADATA_FILE} says why).\n"
        if metadata["skipped"]
        else ""
    )
    files = "".join(f"  - split: {split}\n    path: data/{split}-*.parquet\n" for split in metadata["splits"])
    rows = "".join(
        f"| {split} | {count['num_episodes']} | {count['num_frames']} |\n"
        for split, count in metadata["splits"].items()
    )
    encoder = metadata["encoder"]
    columns = ", ".join(f"`{c}` [T, {size}]" for c, size in metadata["columns"].items())
    return f"""---
tags:
- object-centric
- slots
- world-model
configs:
- config_name: default
  data_files:
{files}---

# {name}

Object slots of {metadata["num_slots"]} x {metadata["slot_size"]} numbers per frame, made by the encoder \
`{encoder["name"]}` (revision {encoder["revision"]}, configuration {encoder["config_hash"]}).
One row per episode: `episode_id`, `slots` [T, {metadata["num_slots"]}, {metadata["slot_size"]}] \
{metadata["dtype"]}{", " + columns if columns else ""}.

| split | episodes | frames |
|---|---|---|
{rows}{left_out}{masks}
Units, statistics of the training split and the suggested frame skip are in `{METADATA_FILE}`.

```python
from cjepa_hf.data import SlotWindows, load_slot_dataset

windows = SlotWindows(load_slot_dataset("<this folder or repository>"), frame_skip={metadata["frame_skip"]})
```
"""


# --------------------------------------------------------------------------------------------------------------------
# Statistics


def _block_statistics(
    chunks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
    key: str,
    steps: int,
    skip: int,
    size: int,
    block=False,
) -> dict[str, np.ndarray]:
    """Mean and unbiased standard deviation of every column over all windows of `steps` steps of `skip` frames.

    Each chunk is (frames [F, size], first frame [E] and length [E] of its episodes). Frames in several windows count
    several times, as in the original code, but no window is built: window starts 0 ... W - 1 of an episode put the
    frames k ... k + W - 1 at place k of a window, and their sum is a difference of two cumulative sums.
    With `block`, the skip frames of a step are separate columns [skip * size], else only the first one counts [size].
    """
    places = np.arange(steps * skip) if block else np.arange(steps) * skip
    shift, total = None, 0.0
    for frames, first, length in chunks:
        windows = length - steps * skip + 1
        first, windows = first[windows > 0], windows[windows > 0]
        if not len(first):
            continue
        values = frames.astype(np.float64)
        known = np.isfinite(values)
        if shift is None:
            # Sums of squares around a rough mean keep their digits when the mean is far from zero.
            shift = np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1)
        values = np.where(known, values - shift, 0)
        sums = np.zeros((len(values) + 1, 3 * size))
        np.cumsum(np.concatenate([known, values, values**2], axis=1), axis=0, out=sums[1:])
        start = first[:, None] + places
        total = total + (sums[start + windows[:, None]] - sums[start]).sum(axis=0)
    if shift is None:
        shift, total = np.zeros(size), np.zeros((len(places), 3 * size))
    if block:
        count, sum1, sum2 = np.split(total.reshape(steps, skip, 3, size).sum(0).transpose(1, 0, 2), 3)
    else:
        count, sum1, sum2 = np.split(total.sum(0).reshape(3, 1, size), 3)
    safe = np.maximum(count, 1)
    mean = sum1 / safe
    variance = np.maximum(sum2 - safe * mean**2, 0) / np.maximum(count - 1, 1)
    mean, std = (mean + shift).reshape(-1), np.sqrt(variance).reshape(-1)
    # A constant (or never known) column carries nothing: dividing by its rounding noise would blow that noise up, by
    # 1 it becomes 0. float32 resolves about 6e-8 of a value, so anything below 1e-6 of the mean is noise.
    std = np.where((std < 1e-8) | (std <= 1e-6 * np.abs(mean)), 1.0, std)
    return {f"{key}_mean": mean, f"{key}_std": std}


def window_statistics(
    dataset: "SlotDataset | datasets.Dataset | datasets.IterableDataset",
    history_length: int = 3,
    prediction_length: int = 1,
    frame_skip: int = 5,
) -> dict[str, list[float]]:
    """Statistics of actions and proprioception over all windows of a (training) split, NaN left out.

    Equal to the original's per-column mean and unbiased standard deviation over all overlapping windows where nothing
    is NaN; there a single NaN made whole columns NaN. Constant columns get a standard deviation of 1.

    Returns:
        Those of `action_mean`, `action_std` [frame_skip * A] and `proprio_mean`, `proprio_std` [P] whose column exists.
    """
    data = dataset.data if isinstance(dataset, SlotDataset) else dataset
    steps = _window_steps(history_length, prediction_length, frame_skip)
    features = data.features if data.features is not None else data._resolve_features().features
    result = {}
    for column, key in (("actions", "action"), ("proprio", "proprio")):
        if column not in features:
            continue
        if isinstance(data, datasets.IterableDataset):
            rows = (row[column] for row in data.select_columns([column]).with_format("numpy"))
            chunks = ((row, np.zeros(1, np.int64), np.array([len(row)])) for row in rows)
        else:
            chunks = _by_chunk(frame_columns(data, [column])[column])
        result |= _block_statistics(
            chunks, key, steps, frame_skip, features[column].shape[1], block=column == "actions"
        )
    return {key: value.tolist() for key, value in result.items()}


def _by_chunk(column: _FrameColumn) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    for number, frames in enumerate(column.frames):
        rows = column.chunk == number
        yield frames, column.first[rows], column.length[rows]


# --------------------------------------------------------------------------------------------------------------------
# Windows


def _window_steps(history_length: int, prediction_length: int, frame_skip: int) -> int:
    for name, value, low in (
        ("history_length", history_length, 1),
        ("prediction_length", prediction_length, 0),
        ("frame_skip", frame_skip, 1),
    ):
        if not isinstance(value, (int, np.integer)) or value < low:
            raise ValueError(f"{name} must be an integer of at least {low}, it is {value!r}")
    return history_length + prediction_length


def _window_columns(dataset: SlotDataset, columns: Sequence[str] | None) -> list[str]:
    if columns is None:
        return [column for column in WINDOW_COLUMNS if column in dataset.columns]
    for column in columns:
        if column not in ("slots", *FLOAT_COLUMNS) or column not in dataset.columns:
            raise ValueError(f"{dataset.name}: no window column {column!r}; it has {dataset.columns}")
    return list(columns)


def normalize_windows(batch: Mapping[str, torch.Tensor], statistics: Mapping) -> dict[str, torch.Tensor]:
    """Normalize `actions` and `proprio` of a batch: (x - mean) / std, then NaN (unknown) becomes 0, the mean.

    `statistics` as [`window_statistics`] returns them (lists, arrays or tensors). Other entries pass unchanged.
    """
    result = dict(batch)
    for column, key in (("actions", "action"), ("proprio", "proprio")):
        if column not in batch:
            continue
        if f"{key}_mean" not in statistics or f"{key}_std" not in statistics:
            raise ValueError(f"the batch has {column} but the statistics have only {sorted(statistics)}")
        x = batch[column]
        mean, std = (
            torch.as_tensor(statistics[f"{key}_{k}"], dtype=x.dtype, device=x.device) for k in ("mean", "std")
        )
        if mean.shape != x.shape[-1:]:
            raise ValueError(
                f"{column} have {x.shape[-1]} columns, {key}_mean has shape {tuple(mean.shape)}: use window_statistics "
                f"with the frame_skip of the windows"
            )
        result[column] = torch.nan_to_num((x - mean) / std, nan=0.0)
    return result


class SlotWindows(torch.utils.data.Dataset):
    """All windows of a slot dataset, gathered straight from its memory-mapped Arrow buffers.

    Args:
        dataset: an indexable [`SlotDataset`] (or a `datasets.Dataset` with its columns).
        history_length, prediction_length: steps of a window.
        frame_skip: frames per step.
        columns: which of `slots`, `actions`, `proprio`, `state`; default: the first three, where present.

    Attributes:
        skipped_episodes: number of episodes too short for a window.

    A batch is a dict of float32 tensors in raw units, NaN where unknown: `slots` [B, n, N, D], `actions`
    [B, n, frame_skip * A], `proprio` [B, n, P], `state` [B, n, S], with n = history_length + prediction_length.

    Example:
        >>> windows = SlotWindows(load_slot_dataset("my_slots"))
        >>> loader = DataLoader(windows, batch_size=256, shuffle=True, collate_fn=windows.collate)
    """

    normalize = staticmethod(normalize_windows)

    def __init__(
        self,
        dataset: SlotDataset | datasets.Dataset,
        history_length: int = 3,
        prediction_length: int = 1,
        frame_skip: int = 5,
        *,
        columns: Sequence[str] | None = None,
    ):
        if not isinstance(dataset, SlotDataset):
            dataset = SlotDataset(dataset)
        if dataset.streaming:
            raise ValueError(f"{dataset.name} is streamed: use StreamingSlotWindows, or load it with streaming=False")
        self.dataset, self.frame_skip = dataset, frame_skip
        self.steps = _window_steps(history_length, prediction_length, frame_skip)
        self.columns = _window_columns(dataset, columns)
        counts = np.maximum(dataset.lengths - self.steps * frame_skip + 1, 0)
        self.skipped_episodes = int((counts == 0).sum())
        self._ends = np.cumsum(counts)
        if not len(self):
            longest = int(dataset.lengths.max()) if len(dataset) else 0
            raise ValueError(
                f"{dataset.name}: no window of ({history_length} + {prediction_length}) * {frame_skip} = "
                f"{self.steps * frame_skip} frames; the longest of {len(dataset)} episodes has {longest}. Use shorter "
                f"windows, a smaller frame_skip, or longer episodes"
            )
        self._views = frame_columns(dataset.data, self.columns)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict:
        # Views would be pickled as copies; the dataset is pickled as the paths of its memory-mapped files.
        return {key: value for key, value in self.__dict__.items() if key != "_views"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._views = frame_columns(self.dataset.data, self.columns)

    def locate(self, indices) -> tuple[np.ndarray, np.ndarray]:
        """Episode and first frame of the windows `indices` [B]: two int64 arrays [B]."""
        indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        size = len(self)
        if indices.size and (indices.min() < -size or indices.max() >= size):
            bad = indices[(indices < -size) | (indices >= size)][0]
            raise IndexError(f"window {bad} of {size}")
        indices = np.where(indices < 0, indices + size, indices)
        episodes = np.searchsorted(self._ends, indices, side="right")
        before = np.where(episodes > 0, self._ends[episodes - 1], 0)
        return episodes, indices - before

    def get_batch(self, indices) -> dict[str, torch.Tensor]:
        """The windows `indices` (integers [B]) as one batch."""
        episodes, starts = self.locate(indices)
        if not len(episodes):
            raise IndexError("a batch needs at least one window index")
        steps = starts[:, None] + np.arange(self.steps) * self.frame_skip
        batch = {}
        for name in self.columns:
            if name == "actions":
                frames = starts[:, None] + np.arange(self.steps * self.frame_skip)
                values = self._views[name].gather(episodes, frames).reshape(len(starts), self.steps, -1)
            else:
                values = self._views[name].gather(episodes, steps)
            batch[name] = torch.from_numpy(values)
        return batch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.get_batch([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        return self.get_batch(indices)

    @staticmethod
    def collate(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`collate_fn` for a `DataLoader`: `__getitems__` has made the batch already."""
        return batch


class StreamingSlotWindows(torch.utils.data.IterableDataset):
    """The windows of a streamed [`SlotDataset`], one by one, optionally through a shuffle buffer.

    Args:
        dataset: a [`SlotDataset`] loaded with `streaming=True` (an indexable one works too).
        history_length, prediction_length, frame_skip, columns: as [`SlotWindows`].
        shuffle_buffer: number of windows held back to be drawn at random; 0 keeps the order. With a buffer the order
            of the files is shuffled as well. `set_epoch` changes the order.
        seed: of the shuffling.

    Every `DataLoader` worker reads its own files. `skipped_episodes` counts those of the last pass (of this process).
    """

    normalize = staticmethod(normalize_windows)
    collate = staticmethod(torch.utils.data.default_collate)

    def __init__(
        self,
        dataset: SlotDataset,
        history_length: int = 3,
        prediction_length: int = 1,
        frame_skip: int = 5,
        *,
        columns: Sequence[str] | None = None,
        shuffle_buffer: int = 0,
        seed: int = 0,
    ):
        if not isinstance(dataset, SlotDataset):
            dataset = SlotDataset(dataset)
        self.dataset, self.frame_skip = dataset, frame_skip
        self.steps = _window_steps(history_length, prediction_length, frame_skip)
        self.columns = _window_columns(dataset, columns)
        self.shuffle_buffer, self.seed, self.epoch = shuffle_buffer, seed, 0
        self.skipped_episodes = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if self.shuffle_buffer < 1:
            yield from self._windows(self.dataset.data)
            return
        data = self.dataset.data
        if isinstance(data, datasets.IterableDataset):
            # the order of the files only (reading several at once would end in a wait of 5 s for its threads)
            data = data.shuffle(seed=self.seed + self.epoch, buffer_size=1, max_buffer_input_shards=1)
        worker = torch.utils.data.get_worker_info()
        random = np.random.default_rng([self.seed, self.epoch, worker.id if worker else 0])
        held = []
        for window in self._windows(data):
            if len(held) < self.shuffle_buffer:
                held.append(window)
            else:
                place = random.integers(len(held))
                held[place], window = window, held[place]
                yield window
        random.shuffle(held)
        yield from held

    def _windows(self, data) -> Iterator[dict[str, torch.Tensor]]:
        self.skipped_episodes, found, span = 0, False, self.steps * self.frame_skip
        for row in data.select_columns(["episode_id", *self.columns]).with_format("numpy"):
            episode = {name: np.asarray(row[name], np.float32) for name in self.columns}
            length = len(episode[self.columns[0]])
            for name, values in episode.items():
                if len(values) != length:
                    raise ValueError(
                        f"{self.dataset.name}: episode {row['episode_id']!r} has {length} frames of "
                        f"{self.columns[0]!r} but {len(values)} of {name!r}"
                    )
            if "slots" in episode and not np.isfinite(episode["slots"]).all():
                raise ValueError(f"{self.dataset.name}: slots of episode {row['episode_id']!r} are not finite")
            self.skipped_episodes += length < span
            for start in range(length - span + 1):
                found = True
                yield {
                    name: torch.from_numpy(
                        values[start : start + span].reshape(self.steps, -1).copy()
                        if name == "actions"
                        else values[start : start + span : self.frame_skip].copy()
                    )
                    for name, values in episode.items()
                }
        if not found and torch.utils.data.get_worker_info() is None:
            raise ValueError(
                f"{self.dataset.name}: no window of {span} frames in {self.skipped_episodes} episodes. Use shorter "
                f"windows or a smaller frame_skip"
            )
