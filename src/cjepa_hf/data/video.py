"""Videos from files, folders, archives and datasets, under one interface that streams frames in bounded memory.

[`open_videos`] returns [`Video`] objects whatever the place they come from:

| source | one video is | name |
|---|---|---|
| a video file, or a folder of them at any depth (mp4, mkv, webm, mov, avi, ...) | a file | its stem |
| CLEVRER, as unpacked or flattened | `videos/<split>/.../video_NNNNN.mp4` | `video_NNNNN` |
| image folders | a folder of pictures, in natural order (`2.png` before `10.png`) | the folder's name |
| numpy | `.npy` [T, H, W, 3], or `.npz` with `frames` and further columns | its stem |
| a folder of stable-worldmodel (`pusht_expert_train`): Arrow table and `videos/<n>_pixels.mp4` | an `episode_idx` | `<n>` |
| HDF5 of stable-worldmodel: `pixels`, `ep_len`, `ep_offset`, `action`, ... | an episode | `<n>` |
| a LeRobotDataset (`lerobot/pusht`), folder or Hub id: one table row per frame, `meta/info.json`; see `lerobot.py` | an episode | `episode_<n>` |
| WebDataset shards (`.tar`), read by `datasets` | an entry | its key |
| a collected dataset, a folder that `datasets` reads, a Hub id, a `Dataset` or `DatasetDict` | a row: `frames` or `images` (list of pictures or uint8 [T, H, W, 3]), a `Video` column, or a `state` that a simulator draws | `episode_id` |

Files of one stem in different folders are named by their path below the source instead; in one folder they are an
error. Folders (or HDF5 files) called or ending in
`train`, `val`, `valid`, `validation` or `test` are splits; `val` and `valid` become `validation`; anything else is
`train`. Beside a video `x.mp4` (or `x.npy`) may lie `x.actions.npy`, `x.proprio.npy`, `x.state.npy`, `x.contacts.npy`
and true masks `x.segments.npy`; in an image folder the same without `x.`. They have T rows; `actions` may have T - 1,
as nothing follows the last frame (it becomes NaN).

Frames are uint8 RGB. Gray is repeated into three channels, an alpha channel is dropped if nothing is transparent, and
phones' rotation is undone; everything else (other types, channels first, transparency, a size that changes) is an error
that says so. A video of a single frame is a video.
"""

import contextlib
import hashlib
import io
import itertools
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from cjepa_hf.simulators.rendering import render_collisions, render_push_t

from .slots import check_local_files, fingerprint, load_split, split_of

__all__ = ["FrameVideo", "Video", "VideoFile", "VideoSource", "open_source", "open_videos"]

logger = logging.getLogger(__name__)

FRAME_COLUMNS = ("frames", "images")
COPIED_COLUMNS = ("actions", "proprio", "state", "contacts")
RENDERERS = {"push_t": render_push_t, "collisions": render_collisions}  # by the `simulator` named in collection.json
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
HDF5_SUFFIXES = (".h5", ".hdf5")
_LONGEST_FRAME = 0.5  # seconds that the last frame may be shown without saying so
_SIDECARS = (*COPIED_COLUMNS, "segments")
_WANT = "expected uint8 RGB [T, H, W, 3]"


class Video:
    """One video: frames and what is known beside them. Get them from [`open_videos`].

    Attributes:
        name: unique in its split.
        path: the file or folder that holds it, None for a row of a dataset.
        fps: frames per second, None if unknown.
        counted: frames that there really are, once a file was read to its end.
    """

    fps: float | None = None
    counted: int | None = None

    def __init__(
        self,
        name: str,
        *,
        path: Path | None = None,
        columns: Callable[[], dict] | None = None,
        segments: Callable[[], np.ndarray | None] | None = None,
        row_hash: Callable[[], str] | None = None,
    ):
        self.name, self.path, self.row_hash = name, path, row_hash
        self._columns, self._segments = columns, segments

    def __len__(self) -> int:
        """Frames, as announced: for a container without a count, duration times rate."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def _read(self, size: int, start: int, stop: int | None, stride: int) -> Iterator:
        """Blocks of at most `size` frames, as [`_rgb`] takes them."""
        raise NotImplementedError

    def chunks(self, size: int = 64, start: int = 0, stop: int | None = None, stride: int = 1) -> Iterator[np.ndarray]:
        """The frames `start, start + stride, ...` before `stop`, as uint8 [at most `size`, H, W, 3], one after another.

        Raises:
            ValueError: there is no frame, the video is damaged, or its frames are not RGB pictures of one size.
        """
        if size < 1 or start < 0 or stride < 1 or (stop is not None and stop <= start):
            raise ValueError(
                f"{self.name}: size={size}, start={start}, stop={stop}, stride={stride}; expected size and stride of at "
                f"least 1 and 0 <= start < stop"
            )
        shape = None
        for block in self._read(size, start, stop, stride):
            block = _rgb(block)
            shape = shape or block.shape[1:3]
            if block.shape[1:3] != shape:
                raise ValueError(f"the size of the frames changes from {shape} to {block.shape[1:3]}: {_WANT}")
            yield block
        if shape is None:
            raise ValueError("it has no frames" if start == 0 else f"it has no frame {start}")

    def frames(self, start: int = 0, stop: int | None = None, stride: int = 1) -> np.ndarray:
        """Frames as one array, uint8 [T, H, W, 3] RGB. Files are decoded from the last key frame that allows it."""
        return np.concatenate(list(self.chunks(64, start, stop, stride)))

    def columns(self) -> dict[str, np.ndarray]:
        """Those of actions, proprio, state and contacts that are known, [T, size] each."""
        columns = {} if self._columns is None else self._columns()
        actions = columns.get("actions")
        if self.path is not None and actions is not None and actions.ndim == 2 and len(actions) == len(self) - 1:
            last = np.full((1, actions.shape[1]), np.nan, np.float32)  # nothing was done after the last frame
            columns["actions"] = np.concatenate([actions.astype(np.float32), last])
        return columns

    def segments(self) -> np.ndarray | None:
        """True masks, int [T, H, W] with 0 = background, or None where there are none."""
        return None if self._segments is None else self._segments()


class VideoFile(Video):
    """A container that FFmpeg reads, through PyAV. `source` is a path, or a function that returns the file's bytes."""

    def __init__(self, source: Path | Callable[[], bytes], name: str, **arguments):
        super().__init__(name, path=source if isinstance(source, Path) else None, **arguments)
        self._source = source
        self._index: _Index | None = _Index(np.zeros(0, np.int64), np.zeros(0, np.int64), False)  # None: of no use

    def _open(self):
        av = _import("av", "video")
        source = self._source if isinstance(self._source, Path) else io.BytesIO(self._source())
        try:
            container = av.open(str(source) if isinstance(source, Path) else source)
        except av.error.FFmpegError as error:  # whose text holds the path, which nobody wants in a published dataset
            raise ValueError(f"the file cannot be opened as a video ({error.strerror})") from error
        if not container.streams.video:
            container.close()
            raise ValueError("the file has no video stream")
        return container

    @cached_property
    def _header(self) -> tuple[int, float | None]:
        with self._open() as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate) if stream.average_rate else None
            length = stream.frames
            if not length and rate and (stream.duration or container.duration):
                seconds = float(stream.duration * stream.time_base) if stream.duration else container.duration / 1e6
                length = round(seconds * rate)
            return length, rate

    def __len__(self) -> int:
        return self._header[0]

    @property
    def fps(self) -> float | None:
        return self._header[1]

    def _read(self, size, start, stop, stride):
        from av.video.reformatter import VideoReformatter

        # Shared by all frames: a converter of its own for every frame takes more time than decoding it.
        converter, block = VideoReformatter(), []
        for number, frame in enumerate(self._frames(start, stop)):
            if number % stride == 0:
                block.append(_decoded(frame, converter))
                if len(block) == size:
                    yield block
                    block = []
        if block:
            yield block

    def _frames(self, start: int, stop: int | None) -> Iterator:
        """The decoded frames from `start` on, from a key frame before it where that gives exactly the same."""
        index = self._index_to(stop) if start and stop is not None else None
        if index is not None and index.key_before(start) is not None:
            for frame in self._from_key_frame(index, start, stop):
                yield frame
                start += 1
            if start == stop:
                return
            self._index = None  # the file is not what its packets say
        yield from itertools.islice(self._from_beginning(stop), start, None)

    def _from_beginning(self, stop: int | None) -> Iterator:
        from av.error import FFmpegError

        decoded, packets, end = 0, 0, 0
        with self._open() as container:
            stream = container.streams.video[0]
            announced = _announced_seconds(container, stream)
            try:
                for packet in container.demux(stream):
                    packets += packet.size > 0
                    end = max(end, (packet.pts or 0) + (packet.duration or 0))
                    for frame in packet.decode():
                        if frame.is_corrupt:
                            raise ValueError(f"frame {decoded} is damaged")
                        yield frame
                        decoded += 1
                        if stop is not None and decoded >= stop:
                            return
            except FFmpegError as error:
                raise ValueError(f"the file is damaged after frame {decoded} ({error})") from error
            expected = stream.frames
            if "mov" in container.format.name:  # where an edit list may leave out packets that the header counts
                expected = min(expected, len(getattr(stream, "index_entries", ())) or expected)
            if packets < expected:
                raise ValueError(f"the file ends after {packets} of {expected} frames: it was cut off")
            seconds = float(end * stream.time_base)
            if announced is not None and seconds < announced - _LONGEST_FRAME:
                raise ValueError(f"the file ends after {seconds:.2f} of {announced:.2f} seconds: it was cut off")
        self.counted = decoded

    def _index_to(self, stop: int) -> "_Index | None":
        """An index of `stop` frames or more, None where there is none: it is read as far as it is needed, and kept."""
        from av.error import FFmpegError

        index = self._index
        if index is not None and len(index.times) < stop and not index.whole:
            count, index = max(stop, 2 * len(index.times)), None
            with self._open() as container, contextlib.suppress(FFmpegError):
                index = _read_index(container, count)
            self._index = index
        return index if index is not None and len(index.times) >= stop else None

    def _from_key_frame(self, index: "_Index", start: int, stop: int) -> Iterator:
        """The frames from `start` to `stop`, or fewer: only as long as their times are those of the index."""
        from av.error import FFmpegError

        times, number = index.times, None
        with self._open() as container, contextlib.suppress(FFmpegError):
            stream = container.streams.video[0]
            container.seek(index.key_before(start), stream=stream)
            for packet in container.demux(stream):
                if number is None:  # the demuxer may choose an earlier key frame
                    place = packet.pts
                    if place is None or place > times[start] or place not in index.keys:
                        return
                    number = int(np.searchsorted(times, place))
                for frame in packet.decode():
                    if frame.pts is not None and frame.pts < place:
                        continue  # shown before the key frame, though decoded after it
                    is_key = frame.key_frame or frame.pts != place
                    if frame.pts != times[number] or frame.is_corrupt or frame.interlaced_frame or not is_key:
                        return
                    if number >= start:
                        yield frame
                    number += 1
                    if number == stop:
                        return


class _Index(NamedTuple):
    """When the first frames are shown (all if `whole`), and which ones can be decoded first; in units of the stream."""

    times: np.ndarray
    keys: np.ndarray
    whole: bool

    def key_before(self, frame: int) -> int | None:
        """Time of the last key frame that is not after `frame`; None if it is the first, where every decoder begins."""
        place = np.searchsorted(self.keys, self.times[frame], side="right") - 1
        return int(self.keys[place]) if place > 0 else None


def _read_index(container, count: int) -> _Index | None:
    """From the packets, which are not decoded, up to at least `count` frames. None where they do not tell which frame
    is which: formats without times, codecs with packets that show no frame (VP8, MPEG-4) or a start in the middle."""
    stream = container.streams.video[0]
    codec, extradata = stream.codec_context.codec.canonical_name, stream.codec_context.extradata or b""
    if codec not in _KEY_FRAMES or not {"matroska", "mov"} & set(container.format.name.split(",")):
        return None
    times, keys, whole = [], [], True
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.pts is None or packet.is_corrupt:
            return None
        if packet.is_keyframe and _KEY_FRAMES[codec](bytes(packet), extradata):
            keys.append(packet.pts)
        if not keys or packet.pts < keys[0]:
            return None
        if not packet.is_discard:  # by an edit list
            times.append(packet.pts)
        if len(times) == count:
            last = max(times)
        # frames are shown after they are decoded: those that follow are later than `last`
        if len(times) > count and packet.dts is not None and packet.dts > last:
            times, whole = [time for time in times if time < packet.dts], False
            break
    times = np.sort(np.array(times, np.int64))
    return _Index(times, np.sort(np.array(keys, np.int64)), whole) if (np.diff(times) > 0).all() else None


def _nal_type(data: bytes, size: int, shift: int, mask: int, last: int) -> int | None:
    """Type of the first slice of a frame of H.264 or HEVC; `size` bytes say how long each of its units is."""
    place = 0
    while place + size < len(data):
        kind = data[place + size] >> shift & mask
        if kind <= last:  # others are parameters and messages
            return kind
        place += size + int.from_bytes(data[place : place + size])
    return None


def _key_h264(data: bytes, extradata: bytes) -> bool:
    # not other I frames, which files call key frames too: what follows one may need what is before it
    return extradata[:1] == b"\1" and _nal_type(data, (extradata[4] & 3) + 1, 0, 31, 5) == 5


def _key_hevc(data: bytes, extradata: bytes) -> bool:
    return extradata[:1] == b"\1" and 16 <= (_nal_type(data, (extradata[21] & 3) + 1, 1, 63, 31) or 0) <= 21


# By codec: whether every frame that is shown after this one can be decoded without those before it.
_KEY_FRAMES = {
    "h264": _key_h264,
    "hevc": _key_hevc,
    "vp9": lambda data, _: not data[0] & 12,
    "av1": lambda data, _: True,  # whether it is one, the decoder says
}


def _announced_seconds(container, stream) -> float | None:
    """When the video should end, by the header of a file that does not count its frames (Matroska, WebM)."""
    if stream.frames or "matroska" not in container.format.name:
        return None
    if re.fullmatch(r"\d+:\d\d:\d\d(\.\d+)?", tag := stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = tag.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    # the duration of the file is that of its longest stream
    return container.duration / 1e6 if container.duration and len(container.streams) == 1 else None


def _decoded(frame, converter) -> np.ndarray:
    alpha = any(component.is_alpha for component in frame.format.components)
    array = converter.reformat(frame, format="rgba" if alpha else "rgb24").to_ndarray()
    return np.rot90(array, round(frame.rotation / 90)) if frame.rotation else array


class FrameVideo(Video):
    """Frames that can be read in any order. `open()` returns a function from a slice to a block of frames."""

    def __init__(
        self, open: Callable[[], Callable], length: int | Callable[[], int], name: str, *, fps=None, **kwargs
    ):
        super().__init__(name, **kwargs)
        self._open, self._length, self.fps = open, length, fps

    def __len__(self) -> int:
        if callable(self._length):
            self._length = self._length()
        return int(self._length)

    def _read(self, size, start, stop, stride):
        stop = len(self) if stop is None else min(stop, len(self))
        read = self._open()
        for first in range(start, stop, size * stride):
            yield read(slice(first, min(first + size * stride, stop), stride))

    def columns(self) -> dict[str, np.ndarray]:
        columns = super().columns()
        check_lengths(columns, len(self))
        return columns


def check_lengths(columns: Mapping[str, np.ndarray], length: int) -> None:
    """Raises ValueError unless every column is [T, size] with T = `length`."""
    for name, values in columns.items():
        if values.ndim != 2 or len(values) != length:
            raise ValueError(f"{name} has the shape {values.shape} for {length} frames (NaN where unknown)")


def _rgb(block) -> np.ndarray:
    """Frames as sources give them (array [T, ...], or a list of arrays and pictures) -> uint8 [T, H, W, 3]."""
    if not isinstance(block, np.ndarray):
        pictures = [_picture(one) for one in block]
        if len({picture.shape for picture in pictures}) > 1:
            sizes = sorted({picture.shape for picture in pictures})
            raise ValueError(f"the frames have different shapes {sizes[:3]}: {_WANT}")
        block = np.stack(pictures)
    if block.dtype != np.uint8:
        hint = ": multiply by 255 and convert" if np.issubdtype(block.dtype, np.floating) else ""
        raise ValueError(f"the frames are {block.dtype} {block.shape}; {_WANT}{hint}")
    if block.ndim == 3:  # gray without an axis for it
        if block.shape[-1] in (3, 4):
            raise ValueError(
                f"the frames have the shape {block.shape}, as one picture has; {_WANT}: add an axis for T"
            )
        block = block[..., None]
    if block.ndim != 4 or 0 in block.shape:
        raise ValueError(f"the frames have the shape {block.shape}; {_WANT}")
    channels = block.shape[-1]
    if channels == 1:
        return np.repeat(block, 3, axis=-1)
    if channels == 4:
        if (block[..., 3] != 255).any():
            raise ValueError("the frames are partly transparent (RGBA): draw them on a background first")
        return np.ascontiguousarray(block[..., :3])
    if channels != 3:
        first = block.shape[1] in (1, 3)
        hint = ", this looks like channels first: move axis 1 to the end" if first else ""
        raise ValueError(f"the frames have the shape {block.shape}; {_WANT}{hint}")
    return block


def _picture(image) -> np.ndarray:
    """A PIL image, encoded {"bytes", "path"}, or an array -> array [H, W(, C)]."""
    from PIL import Image

    if isinstance(image, dict):
        with Image.open(io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]) as opened:
            return _picture(opened)
    if isinstance(image, Image.Image):
        if image.mode in ("P", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
        elif image.mode in ("1", "CMYK", "YCbCr"):
            image = image.convert("RGB")
        elif image.mode not in ("RGB", "RGBA", "L"):
            raise ValueError(f"a picture is of mode {image.mode!r}; {_WANT}: convert it to 8 bits per channel")
        return np.asarray(image)
    return np.asarray(image)


def _import(module: str, extra: str):
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f'reading this source needs the package {module}: run `pip install "cjepa-hf[{extra}]"`'
        ) from error


# --------------------------------------------------------------------------------------------------------------------
# Sources


@dataclass
class VideoSource:
    """Videos by split, with what is known of them all: `fps`, `units`, and `render` options where a simulator draws."""

    name: str
    splits: dict[str, list[Video]]
    metadata: dict = field(default_factory=dict)

    def content(self, split: str) -> list:
        """A json value that changes with the content: names, and hashes of samples of all files (of 16 rows)."""
        videos = self.splits[split]
        paths = dict.fromkeys(video.path for video in videos if video.path is not None)
        rows = [video for video in videos if video.path is None]
        rows = [rows[i] for i in sorted({round(i) for i in np.linspace(0, len(rows) - 1, 16)})] if rows else []
        return [[video.name for video in videos], [_path_hash(p) for p in paths], [video.row_hash() for video in rows]]


def open_videos(source, split: str | None = None, **arguments) -> list[Video]:
    """The videos of one split of `source` (see the module for what it may be), sorted by name or in rows' order.

    Args:
        source: path, Hub id, `Dataset`, `DatasetDict` or [`VideoSource`].
        split: may be left out where there is only one.
        arguments: as [`open_source`].
    """
    opened = open_source(source, splits=None if split is None else [split], **arguments)
    if len(opened.splits) > 1:
        raise ValueError(f"{opened.name} has the splits {list(opened.splits)}: name one of them")
    return next(iter(opened.splits.values()))


def open_source(
    source,
    *,
    splits: Sequence[str] | None = None,
    revision: str | None = None,
    render_resolution: int = 64,
    render_options: Mapping | None = None,
) -> VideoSource:
    """All videos of a source, by split; nothing is decoded yet.

    Args:
        source: see the module.
        splits: only these; default: all.
        revision: branch, tag or commit on the Hub.
        render_resolution: pixels per side of frames that a simulator draws from states.
        render_options: more arguments of the renderer, such as `{"goal_pose": None}`.

    Raises:
        FileNotFoundError: there is no such place.
        ValueError: nothing in it is a video, a split is missing, a file is damaged, or two rows have one name.
    """
    if isinstance(source, VideoSource):
        wanted = _wanted(source.name, list(source.splits), splits)
        return VideoSource(source.name, {split: source.splits[split] for split in wanted}, source.metadata)
    if isinstance(source, datasets.Dataset):
        source = datasets.DatasetDict({str(source.split or "train"): source})
    if not isinstance(source, datasets.DatasetDict):
        from .lerobot import find_lerobot, open_lerobot

        folder = find_lerobot(source, revision)
        if folder is not None:
            name = Path(source).resolve().name if Path(source).exists() else str(source)
            return open_lerobot(folder, splits=splits, name=name)
    path = None if isinstance(source, datasets.DatasetDict) else Path(source)
    found = None if path is None or not path.exists() else _files_by_split(path)
    if found:
        name = path.resolve().name
        wanted = _wanted(name, list(found), splits)
        videos = {split: _file_videos(found[split], name, split) for split in wanted}
        return VideoSource(name, {split: _named(videos[split], split) for split in wanted})
    name, collection, data = _open_datasets(source, revision, splits)
    options = {"goal_pose": collection["goal_pose"]} if "goal_pose" in collection else {}
    options = {"resolution": render_resolution, **options, **(render_options or {})}
    metadata = {"fps": collection.get("fps"), "units": collection.get("units")}
    column, render = _frame_column(name, next(iter(data.values())).features, collection)
    if render is not None:
        metadata["render"] = options
        render = partial(render, **options)
    metadata["content"] = fingerprint(collection)
    result = {split: _row_videos(rows, split, column, render, metadata["fps"]) for split, rows in data.items()}
    return VideoSource(name, result, metadata)


def _wanted(name: str, available: list[str], splits: Sequence[str] | None) -> list[str]:
    missing = set(splits or ()) - set(available)
    if missing or not available:
        raise ValueError(f"{name} has no split {sorted(missing) or ''}; it has {available}")
    return list(splits or sorted(available, key=lambda split: (split != "train", split)))


def _natural(path) -> list:
    """Sorts 2 before 10."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", str(path))]


# --------------------------------------------------------------------------------------------------------------------
# Files


def _split_name(name: str) -> str | None:
    found = re.search(r"(?:^|[_\-. ])(train|val|valid|validation|test)$", name.lower())
    return {"val": "validation", "valid": "validation"}.get(found[1], found[1]) if found else None


def _files_by_split(path: Path) -> dict[str, list[Path]] | None:
    """Files and folders to look in for each split; None if it is a dataset that `datasets` reads."""
    if path.is_file():
        return {_split_name(path.stem) or "train": [path]}
    if _is_swm(path):
        return {_split_name(path.name) or "train": [path]}
    if _is_dataset(path):
        return None
    if (path / "videos").is_dir():  # CLEVRER, with annotations and questions beside
        return _files_by_split(path / "videos")
    entries = sorted((p for p in path.iterdir() if not p.name.startswith(".")), key=_natural)
    splits: dict[str, list[Path]] = {}
    for entry in entries:
        split = _split_name(entry.stem if entry.is_file() else entry.name)
        if split and (entry.is_dir() or entry.suffix.lower() in HDF5_SUFFIXES):
            splits.setdefault(split, []).append(entry)
    if not splits:
        splits = {_split_name(path.name) or "train": [path]}
    else:
        used = {place for places in splits.values() for place in places}
        others = [e.name for e in entries if e not in used and (_is_media(e) if e.is_file() else _has_videos(e))]
        if others:
            logger.warning("%s has splits; what lies beside them is not read: %s", path, ", ".join(others[:5]))
    splits = {split: places for split, places in splits.items() if any(map(_has_videos, places))}
    if splits:
        return splits
    raise ValueError(
        f"{path} holds no videos: expected video files ({', '.join(VIDEO_SUFFIXES[:5])}, ...), folders of pictures, "
        f".npy, .npz, .h5 or .tar files, or a dataset (Parquet or Arrow files). See `cjepa_hf.data.video`"
    )


def _is_swm(path: Path) -> bool:
    return path.is_dir() and (path / "videos").is_dir() and (path / "dataset_info.json").is_file()


def _is_dataset(path: Path) -> bool:
    marks = ("collection.json", ".collecting", "dataset_info.json", "dataset_dict.json")
    return any((path / mark).exists() for mark in marks) or any(
        next(path.glob(pattern), None) for pattern in ("*.parquet", "*/*.parquet", "*.arrow")
    )


def _walk(path: Path) -> Iterator[tuple[Path, list[Path]]]:
    for folder, folders, files in os.walk(path, followlinks=True):
        folders[:] = sorted((f for f in folders if not f.startswith(".")), key=_natural)
        yield Path(folder), sorted((Path(folder, f) for f in files if not f.startswith(".")), key=_natural)


def _is_media(file: Path) -> bool:
    suffix = file.suffix.lower()
    if suffix == ".npy":
        return file.stem.split(".")[-1] not in _SIDECARS
    return suffix in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, *HDF5_SUFFIXES, ".npz", ".tar")


def _has_videos(place: Path) -> bool:
    return place.is_file() or _is_swm(place) or any(_is_media(f) for _, files in _walk(place) for f in files)


def _file_videos(places: list[Path], source: str, split: str) -> list[tuple[Path, Video]]:
    """(path for the name, video) of everything in the files and folders."""
    videos: list[tuple[Path, Video]] = []
    for place in places:
        if _is_swm(place):
            videos += _swm_videos(place)
            continue
        for folder, files in [(place.parent, [place])] if place.is_file() else _walk(place):
            tars = [file for file in files if file.suffix.lower() == ".tar"]
            if tars:
                videos += _tar_videos(tars, split)
            pictures = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
            if pictures and place.is_file():
                raise ValueError(f"{place} is one picture: give the folder that holds the pictures of a video")
            if pictures:
                opener = partial(_open_pictures, pictures)
                videos.append((folder, FrameVideo(opener, len(pictures), "", path=folder, **_beside(folder, ""))))
            for file in files:
                suffix, beside = file.suffix.lower(), _beside(file.parent, file.stem + ".")
                if suffix in VIDEO_SUFFIXES:
                    videos.append((file.with_suffix(""), VideoFile(file, "", **beside)))
                elif suffix == ".npy" and _is_media(file):
                    opener, length = partial(_open_npy, file), partial(_npy_length, file)
                    videos.append((file.with_suffix(""), FrameVideo(opener, length, "", path=file, **beside)))
                elif suffix == ".npz":
                    videos.append((file.with_suffix(""), _npz_video(file)))
                elif suffix in HDF5_SUFFIXES:
                    videos += _hdf5_videos(file)
                elif place.is_file() and suffix != ".tar":
                    raise ValueError(
                        f"{place} is not a video that is read here: see the list in `cjepa_hf.data.video`"
                    )
    if not videos:
        raise ValueError(f"{source}: split {split!r} holds no videos")
    return videos


def _named(videos: list[tuple[Path, Video]], split: str) -> list[Video]:
    """Names are stems, or paths where stems repeat; sorted by name."""
    stems = Counter(path.name for path, _ in videos)
    root = Path(os.path.commonpath([path.parent for path, _ in videos]))
    for path, video in videos:
        if not video.name:
            video.name = path.name if stems[path.name] == 1 else path.relative_to(root).as_posix()
    videos = [video for _, video in videos]
    _check_names([video.name for video in videos], split)
    return sorted(videos, key=lambda video: _natural(video.name))


def _check_names(names: list[str], split: str) -> None:
    if len(set(names)) < len(names):
        double = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"episode_id {double!r} occurs more than once in split {split!r}: rename one of the episodes")


def _beside(folder: Path, prefix: str) -> dict[str, Callable]:
    """The arguments `columns` and `segments` of a video whose companions are `<folder>/<prefix><name>.npy`."""

    def read(*names):
        files = {name: folder / f"{prefix}{name}.npy" for name in names}
        return {name: np.load(file, allow_pickle=False) for name, file in files.items() if file.is_file()}

    return {"columns": lambda: read(*COPIED_COLUMNS), "segments": lambda: read("segments").get("segments")}


def _open_pictures(files: list[Path]):
    return lambda part: [_picture({"path": file}) for file in files[part]]


def _open_npy(path: Path):
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return lambda part: np.array(array[part])  # a copy: torch wants memory that can be written


def _npy_length(path: Path) -> int:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return len(array) if array.ndim else 0


def _npz_video(path: Path) -> Video:
    def read(*names):
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names if name in arrays}

    def frames():
        found = read("frames")
        if not found:
            raise ValueError("it has no array 'frames'")
        return found["frames"]

    return FrameVideo(
        lambda: frames().__getitem__,
        lambda: len(frames()),
        "",
        path=path,
        columns=lambda: read(*COPIED_COLUMNS),
        segments=lambda: read("segments").get("segments"),
    )


def _swm_videos(folder: Path) -> list[tuple[Path, Video]]:
    """Folder of stable-worldmodel: one table row per step, `pixels` names the episode's video."""
    table = datasets.load_from_disk(str(folder)).with_format(None)
    needed = {"episode_idx", "step_idx", "pixels"}
    if not needed <= set(table.features):
        raise ValueError(f"{folder}: the table has {sorted(table.features)}; expected {sorted(needed)} among them")
    episodes, steps = (np.asarray(table.data.column(name).to_numpy()) for name in ("episode_idx", "step_idx"))
    order = np.lexsort((steps, episodes))
    files = table.data.column("pixels")
    rows = np.split(order, np.flatnonzero(np.diff(episodes[order])) + 1) if len(order) else []
    result = []
    for row in rows:
        path = folder / str(files[int(row[0])].as_py())
        columns = partial(_table_columns, table, row)
        result.append((path, VideoFile(path, str(episodes[row[0]]), columns=columns)))
    return result


def _table_columns(table: datasets.Dataset, rows: np.ndarray) -> dict[str, np.ndarray]:
    columns = {"actions": "action", "proprio": "proprio", "state": "state"}
    columns = {ours: theirs for ours, theirs in columns.items() if theirs in table.features}
    part = table.select_columns(list(columns.values())).with_format("numpy").select(rows)[:]
    return {ours: np.asarray(part[theirs], np.float32).reshape(len(rows), -1) for ours, theirs in columns.items()}


def _hdf5_videos(path: Path) -> list[tuple[Path, Video]]:
    """HDF5 of stable-worldmodel: all steps in one array per column, `ep_offset` and `ep_len` say which episode."""
    h5py = _import("h5py", "hdf5")
    with contextlib.suppress(ImportError):
        import hdf5plugin  # noqa: F401  (registers the compressions that stable-worldmodel writes)
    try:
        with h5py.File(path) as file:
            if not {"pixels", "ep_len", "ep_offset"} <= set(file):
                raise ValueError(f"{path} has {sorted(file)}; expected pixels, ep_len and ep_offset (and action, ...)")
            lengths, offsets = file["ep_len"][:], file["ep_offset"][:]
    except OSError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    names = {"actions": "action", "proprio": "proprio", "state": "state"}

    def columns(first, length):
        with h5py.File(path) as file:
            return {
                ours: np.asarray(file[theirs][first : first + length], np.float32).reshape(length, -1)
                for ours, theirs in names.items()
                if theirs in file
            }

    def opener(first):
        def read(part):
            with h5py.File(path) as file:
                block = file["pixels"][first + part.start : first + part.stop : part.step]
            # their two layouts: [T, C, H, W] and [T, H, W, C]
            return block.transpose(0, 2, 3, 1) if block.shape[1] == 3 and block.shape[-1] != 3 else block

        return read

    return [
        (path, FrameVideo(partial(opener, int(first)), int(length), str(number), path=path,
                          columns=partial(columns, int(first), int(length))))
        for number, (first, length) in enumerate(zip(offsets, lengths))
    ]  # fmt: skip


def _tar_videos(tars: list[Path], split: str) -> list[tuple[Path, Video]]:
    try:
        data = datasets.load_dataset("webdataset", data_files={split: [str(tar) for tar in tars]}, split=split)
    except (datasets.exceptions.DatasetGenerationError, tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(
            f"the shards {[tar.name for tar in tars[:3]]} cannot be read ({error.__cause__ or error})"
        ) from error
    for name, feature in data.features.items():  # those whose ending `datasets` does not know for a video's
        if f".{name.lower()}" in VIDEO_SUFFIXES and feature == datasets.Value("binary"):
            data = data.cast_column(name, datasets.Video(decode=False))
    renamed = {name: name.removesuffix(".npy") for name in data.features if name.removesuffix(".npy") in _SIDECARS}
    data = data.rename_columns({old: new for old, new in renamed.items() if old != new}).rename_column(
        "__key__", "episode_id"
    )
    column, render = _frame_column(tars[0].parent.name, data.features, {})
    return [(tars[0], video) for video in _row_videos(data, split, column, render, None)]


def _path_hash(path: Path) -> str:
    """Of a file: its size and four blocks; of a folder: names and sizes of its files, and blocks of three of them."""
    total = hashlib.sha256()
    try:
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.is_file())
            total.update(json.dumps([[p.name, p.stat().st_size] for p in files]).encode())
            parts = [files[0], files[len(files) // 2], files[-1]] if files else []
        else:
            parts = [path]
        for part in parts:
            size = part.stat().st_size
            total.update(str(size).encode())
            with open(part, "rb") as file:
                for start in sorted({size * i // 3 // 4096 * 4096 for i in range(3)} | {max(size - 16384, 0)}):
                    file.seek(start)
                    total.update(file.read(16384))
    except OSError as error:  # a video that is missing is damaged, not the source
        total.update(type(error).__name__.encode())
    return total.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------------------
# Datasets


def _open_datasets(source, revision, splits) -> tuple[str, dict, dict[str, datasets.Dataset]]:
    """Name, content of collection.json ({} if there is none) and the wanted splits."""
    collection: dict = {}
    if isinstance(source, datasets.DatasetDict):
        return "DatasetDict", collection, {s: source[s] for s in _wanted("DatasetDict", list(source), splits)}
    folder, name = Path(source), str(source)
    if folder.exists():
        name, path = folder.resolve().name, folder / "collection.json"
        if not path.exists() and (folder / ".collecting").exists():
            raise ValueError(f"{folder} is an interrupted collection: run the same collection again to finish it")
        if next(folder.glob("*.arrow"), None) or (folder / "dataset_dict.json").exists():
            data = datasets.load_from_disk(str(folder))
            if isinstance(data, datasets.Dataset):
                data = datasets.DatasetDict({_split_name(name) or "train": data})
            return name, collection, {split: data[split] for split in _wanted(name, list(data), splits)}
        check_local_files(folder)
        available = list(dict.fromkeys(split_of(p) for p in sorted(folder.glob("data/*-[0-9]*.parquet"))))
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
    wanted = _wanted(name, available, splits)
    try:
        data = {split: load_split(str(source), split, revision=revision) for split in wanted}
    except datasets.exceptions.DatasetGenerationError as error:
        damaged = _damaged_file(folder) if folder.exists() else None
        if damaged is None:
            raise
        raise ValueError(f"{damaged}: copy it, or make the dataset, again") from error
    return name, collection, data


def _damaged_file(folder: Path) -> str | None:
    """The first Parquet file that cannot be read whole: `datasets` does not say which."""
    for path in sorted(folder.rglob("*.parquet")):
        try:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    file.read_row_group(group)
        except (pa.ArrowException, OSError) as error:
            return f"{path} is damaged ({error})"
    return None


def _frame_column(name: str, features: datasets.Features, collection: dict) -> tuple[str, Callable | None]:
    """The column the frames come from, and the renderer if it holds states."""
    for column in FRAME_COLUMNS:
        if column in features:
            shape = getattr(features[column], "shape", None)
            if shape is not None and (len(shape) != 4 or shape[-1] not in (1, 3, 4)):
                raise ValueError(
                    f"{name}: column {column!r} has the shape {tuple(shape)}; frames must be [T, H, W, 3], RGB"
                )
            return column, None
    for column, feature in features.items():
        if isinstance(feature, datasets.Video):
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
        f"{name} has columns {sorted(features)}: it needs 'frames' or 'images' (RGB frames), a Video column, or the "
        f"'state' of a collected dataset"
    )


def _row_hash(data: datasets.Dataset, row: int) -> str:
    table = data.with_format("arrow")[row : row + 1]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
        writer.write_table(table.replace_schema_metadata().combine_chunks())
    return hashlib.sha256(sink.getvalue()).hexdigest()[:16]


def _row_videos(data: datasets.Dataset, split: str, column: str, render: Callable | None, fps) -> list[Video]:
    feature = data.features[column]
    is_file = isinstance(feature, datasets.Video)
    is_pictures = isinstance(getattr(feature, "feature", None), datasets.Image)
    names = _row_names(data, split, column if is_file else None)
    lengths = None if is_file else _list_lengths(data, column)
    if is_file:
        data = data.cast_column(column, datasets.Video(decode=False))  # decoded by PyAV, as files are
    elif is_pictures:
        data = data.cast_column(column, datasets.List(datasets.Image(decode=False)))  # decoded when they are used
    copied = [name for name in COPIED_COLUMNS if name in data.features]
    frames = data.select_columns([column]).with_format(None if is_file or is_pictures else "numpy")
    beside = data.select_columns([name for name in _SIDECARS if name in data.features]).with_format("numpy")

    def columns(row):
        values = beside.select_columns(copied)[row] if copied else {}
        return {name: np.asarray(value) for name, value in values.items() if value is not None}

    def file_bytes(row):
        value = frames[row][column]
        return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()

    def states(row):
        values = np.asarray(frames[row][column])
        wrong = np.flatnonzero(~np.isfinite(values).all(axis=-1))
        if len(wrong):
            raise ValueError(f"state is not finite at frame {wrong[0]}")
        return values

    def open_frames(row):
        if render is not None:
            values = states(row)
            return lambda part: render(values[part])
        values = frames[row][column]
        if getattr(feature, "dtype", None) == "uint8":  # the numpy format turns every integer into int64
            values = np.asarray(values, np.uint8)
        return values.__getitem__

    def segments(row):
        if "segments" in beside.features:
            return np.asarray(beside.select_columns(["segments"])[row]["segments"])
        if render is None or render.func is not render_push_t:
            return None
        return push_t_segments(states(row), render)

    result: list[Video] = []
    for row, name in enumerate(names):
        known = {"columns": partial(columns, row), "segments": partial(segments, row)}
        known["row_hash"] = partial(_row_hash, data, row)
        if is_file:
            result.append(VideoFile(partial(file_bytes, row), name, **known))
        else:
            result.append(FrameVideo(partial(open_frames, row), int(lengths[row]), name, fps=fps, **known))
    return result


def push_t_segments(states: np.ndarray, render: Callable) -> np.ndarray:
    """int [T, H, W]: where the picture changes when agent (1), block (3) and goal (2) are left out one after another."""
    seen, hidden = render(states).astype(int), []
    labels = np.zeros(seen.shape[:3], np.int64)
    for label, thing in ((1, "agent"), (3, "block"), (2, "goal")):
        hidden.append(thing)
        without = render(states, hide=tuple(hidden)).astype(int)
        changed = np.abs(without - seen).sum(-1) > 96  # about half of the contrast: edges are smooth
        labels[changed & (labels == 0)] = label
        seen = without
    return labels


def _row_names(data: datasets.Dataset, split: str, video_column: str | None) -> list[str]:
    if "episode_id" in data.features:
        names = data.with_format(None)["episode_id"][:]
    elif video_column is not None:
        chunks = data.data.column(video_column).chunks
        paths = [p for chunk in chunks for p in pc.struct_field(chunk, "path").to_pylist()]
        if data._indices is not None:
            paths = [paths[i] for i in data._indices.column(0).to_pylist()]
        names = [Path(path).stem if path else None for path in paths]
        names = names if len(set(names)) == len(names) else [None] * len(names)
    else:
        names = [None] * len(data)
    names = [name or f"{split}-{row:06d}" for row, name in enumerate(names)]
    _check_names(names, split)
    return names


def _list_lengths(data: datasets.Dataset, column: str) -> np.ndarray:
    """Frames of each episode, int64 [E], from the Arrow offsets."""
    chunks = [c.storage if isinstance(c, pa.ExtensionArray) else c for c in data.data.column(column).chunks]
    if not all(pa.types.is_list(c.type) or pa.types.is_large_list(c.type) for c in chunks):
        raise ValueError(f"column {column!r} must hold one list of frames per episode, it is {data.features[column]}")
    lengths = [pc.fill_null(pc.list_value_length(c), 0).to_numpy() for c in chunks]
    lengths = np.concatenate([np.zeros(0, np.int64), *lengths]).astype(np.int64)
    return lengths if data._indices is None else lengths[data._indices.column(0).to_numpy()]
