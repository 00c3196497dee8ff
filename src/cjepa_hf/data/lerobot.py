"""LeRobotDatasets (such as `lerobot/pusht`) as videos: folders or Hub ids of the format's versions 2.0 to 3.0.

| | version 2 | version 3 |
|---|---|---|
| table, one row per frame | `data/chunk-000/episode_000007.parquet` | `data/chunk-000/file-000.parquet`, many episodes each |
| video | `videos/chunk-000/<camera>/episode_000007.mp4` | `videos/<camera>/chunk-000/file-000.mp4`, many episodes each |
| where an episode is | in the names | `meta/episodes/chunk-000/file-000.parquet` |

`meta/info.json` says which, and where; cameras may also be columns of pictures in the table. `action` becomes `actions`,
`observation.state` becomes `proprio`, `observation.environment_state` becomes `state`, all in the units of the dataset:
the actions of `lerobot/pusht` are positions in px that the agent goes to, not the relative ones of our Push-T.
"""

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from .video import FrameVideo, Video, VideoFile, VideoSource, _decoded, _picture

__all__ = ["find_lerobot", "open_lerobot"]

_COLUMNS = {"actions": "action", "proprio": "observation.state", "state": "observation.environment_state"}
_INFO = "meta/info.json"


def find_lerobot(source: str | os.PathLike, revision: str | None = None) -> Path | None:
    """The folder of a LeRobotDataset (of the Hub: a downloaded copy), or None if `source` is none."""
    folder = Path(source)
    if folder.exists():
        return folder if (folder / _INFO).is_file() else None
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        return None
    try:
        hf_hub_download(str(source), _INFO, repo_type="dataset", revision=revision)
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None
    return Path(snapshot_download(str(source), repo_type="dataset", revision=revision))


def open_lerobot(
    folder: str | os.PathLike,
    *,
    camera: str | None = None,
    splits: Sequence[str] | None = None,
    name: str | None = None,
) -> VideoSource:
    """
    All episodes of a LeRobotDataset, by split; nothing is decoded yet. `extract_slots` takes the result as its source.

    Args:
        camera: feature that holds the frames, such as "observation.image"; may be left out where there is only one.
        splits: only these; default: all that `meta/info.json` names.

    Raises `ValueError` for folders of another format or version, unknown cameras and splits, missing or damaged files.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    info = _read_info(folder, name)
    version = str(info.get("codebase_version", ""))
    if not re.match(r"v?[23]\.", version):
        raise ValueError(
            f"{name} is a LeRobotDataset of version {version or 'unknown'}; versions 2.0 to 3.0 are read here: convert it "
            f"with lerobot's own scripts"
        )
    cameras = [key for key, feature in info["features"].items() if feature.get("dtype") in ("image", "video")]
    if camera is None and len(cameras) != 1:
        raise ValueError(f"{name} has the cameras {cameras}: choose one with open_lerobot(folder, camera=...)")
    camera = camera or cameras[0]
    if camera not in cameras:
        raise ValueError(f"{name} has no camera {camera!r}; it has {cameras}")
    rows = _episode_rows(folder, name)
    is_video = info["features"][camera]["dtype"] == "video"
    places = _video_places(folder, info, camera, rows, name) if is_video else {}
    wanted = _splits(info, sorted(rows), name)
    missing = set(splits or ()) - set(wanted)
    if missing:
        raise ValueError(f"{name} has no split {sorted(missing)}; it has {sorted(wanted)}")
    videos = {}
    for split in splits or wanted:
        videos[split] = []
        for episode in wanted[split]:
            file, first, length = rows[episode]
            columns = partial(_columns, file, first, length, list(info["features"]))
            title, fps = f"episode_{episode:06d}", info.get("fps")
            if is_video:
                video: Video = _Part(*places[episode], length, fps, title, columns=columns)
            else:
                opener = partial(_open_pictures, file, camera, first)
                video = FrameVideo(opener, length, title, fps=fps, path=file, columns=columns)
            videos[split].append(video)
    return VideoSource(name, videos, {"fps": info.get("fps")})


def _read_info(folder: Path, name: str) -> dict[str, Any]:
    try:
        info = json.loads((folder / _INFO).read_text(encoding="utf-8"))
        if not isinstance(info["features"], Mapping):
            raise KeyError("features")
    except FileNotFoundError:
        raise ValueError(f"{name} is no LeRobotDataset: it has no {_INFO}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: {_INFO} is damaged ({error!r}): download it again") from None
    return info


def _episode_rows(folder: Path, name: str) -> dict[int, tuple[Path, int, int]]:
    """For every episode its file, its first row there, and how many they are."""
    result: dict[int, tuple[Path, int, int]] = {}
    for file in sorted((folder / "data").rglob("*.parquet")):
        try:
            table = pq.read_table(file, columns=["episode_index", "frame_index"])
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ValueError(f"{file} is damaged ({error}): download it again") from None
        episodes, frames = (table.column(i).to_numpy().reshape(-1) for i in range(2))
        starts = np.flatnonzero(np.diff(episodes, prepend=-1))
        for first, stop in itertools.pairwise([*starts.tolist(), len(episodes)]):
            episode = int(episodes[first])
            if episode in result or not np.array_equal(frames[first:stop], np.arange(stop - first)):
                raise ValueError(f"{file}: the rows of episode {episode} are not its frames 0, 1, ... in one place")
            result[episode] = (file, first, stop - first)
    if not result:
        raise ValueError(f"{name} has no episodes: no Parquet files below data/")
    return result


def _video_places(folder, info, camera, rows, name) -> dict[int, tuple[Path, float]]:
    """For every episode its video file, and at which second of it the episode begins."""
    pattern = info.get("video_path")
    if not pattern:
        raise ValueError(f"{name}: {_INFO} has no video_path for the camera {camera!r}")
    if str(info["codebase_version"]).lstrip("v").startswith("2"):
        chunk = info.get("chunks_size", 1000)
        return {
            e: (folder / pattern.format(episode_chunk=e // chunk, video_key=camera, episode_index=e), 0.0)
            for e in rows
        }
    names = [f"videos/{camera}/{key}" for key in ("chunk_index", "file_index", "from_timestamp")]
    result = {}
    for file in sorted((folder / "meta" / "episodes").rglob("*.parquet")):
        try:
            table = pq.read_table(file, columns=["episode_index", *names]).to_pydict()
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ValueError(f"{file} is damaged ({error}): download it again") from None
        for episode, part, number, begin in zip(table["episode_index"], *(table[n] for n in names), strict=True):
            place = pattern.format(video_key=camera, chunk_index=part, file_index=number)
            result[episode] = (folder / place, float(begin))
    missing = sorted(set(rows) - set(result))
    if missing:
        raise ValueError(f"{name}: meta/episodes does not say where the videos of episodes {missing[:5]} are")
    return result


def _splits(info: Mapping[str, Any], episodes: list[int], name: str) -> dict[str, list[int]]:
    result = {}
    for split, text in (info.get("splits") or {"train": f"0:{episodes[-1] + 1}"}).items():
        found = re.fullmatch(r"(\d+):(\d+)", str(text))
        if not found:
            raise ValueError(f"{name}: {_INFO} says {split}: {text!r}; expected a range of episodes such as 0:50")
        chosen = [e for e in episodes if int(found[1]) <= e < int(found[2])]
        if chosen:
            result[{"val": "validation", "valid": "validation"}.get(split, split)] = chosen
    return result


def _rows(file: Path, columns: list[str], first: int, length: int) -> pa.Table:
    """Rows of a Parquet file; only the row groups that hold them are read."""
    with pq.ParquetFile(file) as opened:
        ends = np.cumsum([0] + [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)])
        groups = [i for i in range(opened.num_row_groups) if ends[i] < first + length and ends[i + 1] > first]
        return opened.read_row_groups(groups, columns=columns).slice(first - int(ends[groups[0]]), length)


def _columns(file: Path, first: int, length: int, features: list[str]) -> dict[str, np.ndarray]:
    wanted = {ours: theirs for ours, theirs in _COLUMNS.items() if theirs in features}
    table = _rows(file, list(wanted.values()), first, length)
    return {
        ours: np.array(table.column(theirs).to_pylist(), np.float32).reshape(length, -1)
        for ours, theirs in wanted.items()
    }


def _open_pictures(file: Path, camera: str, first: int):
    def read(part: slice) -> list[np.ndarray]:
        start, stop, stride = part.start, part.stop, part.step or 1
        pictures = _rows(file, [camera], first + start, stop - start).column(camera).to_pylist()[::stride]
        root = next(parent for parent in file.parents if (parent / _INFO).is_file())
        return [_picture(p if p.get("bytes") else {"path": root / p["path"], "bytes": None}) for p in pictures]

    return read


class _Part(VideoFile):
    """`length` frames of a video file from the second `begin` on; what is before is not decoded."""

    def __init__(self, source: Path, begin: float, length: int, fps: float | None, name: str, **arguments):
        super().__init__(source, name, **arguments)
        self.begin, self.length, self.rate = begin, length, fps

    def __len__(self) -> int:
        return self.length

    @property
    def fps(self) -> float | None:
        return self.rate

    def _read(self, size, start, stop, stride):
        from av.error import FFmpegError
        from av.video.reformatter import VideoReformatter

        if not self.path.is_file():
            raise ValueError(f"its video {self.path} is missing: download the dataset again")
        stop = self.length if stop is None else min(stop, self.length)
        converter, block, number = VideoReformatter(), [], 0
        with self._open() as container:
            stream = container.streams.video[0]
            rate = self.rate or float(stream.average_rate)
            earliest = self.begin + (start - 0.5) / rate
            container.seek(max(int((self.begin + start / rate) / stream.time_base), 0), stream=stream)
            number = start
            try:
                for frame in container.decode(stream):
                    if frame.time < earliest:
                        continue
                    if number >= stop:
                        break
                    if (number - start) % stride == 0:
                        block.append(_decoded(frame, converter))
                    number += 1
                    if len(block) == size:
                        yield block
                        block = []
            except FFmpegError as error:
                raise ValueError(f"{self.path} is damaged after frame {number} ({error})") from error
        if number < stop:
            raise ValueError(f"{self.path} ends after {number} of the episode's {self.length} frames: it was cut off")
        if block:
            yield block
