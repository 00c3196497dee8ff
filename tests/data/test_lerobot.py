"""LeRobotDatasets of both layouts, with pictures in the table and with videos, made as lerobot lays them out."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cjepa_hf.data.extract import extract_slots
from cjepa_hf.data.lerobot import open_lerobot
from cjepa_hf.data.slots import load_slot_dataset
from cjepa_hf.data.video import open_source, open_videos
from cjepa_hf.models.color_isa import ColorIsaConfig, ColorIsaModel

LENGTHS, FPS = (7, 12, 5), 10
CAMERA = "observation.image"


def picture(episode: int, frame: int) -> np.ndarray:
    """Large even areas: what they say survives a lossy codec."""
    image = np.full((32, 32, 3), 40 * (episode + 1), np.uint8)
    image[:, : 16 + frame, 0] = 250
    image[:16, :, 2] = 20 * frame
    return image


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def state_of(episode: int, frame: int) -> list[float]:
    return [100.0 * episode + frame, 5.0]


def action_of(episode: int, frame: int) -> list[float]:
    return [float(frame), -float(episode)]


def write_video(path, episodes):
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": "2", "crf": "10"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for episode in episodes:
            for frame in range(LENGTHS[episode]):
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture(episode, frame), format="rgb24")):
                    container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def dataset(folder, *, version="v2.1", dtype="image", splits=None):
    """Three episodes as lerobot stores them."""
    is_v3 = version == "v3.0"
    rows = [
        {
            "observation.state": state_of(e, t), "action": action_of(e, t), "episode_index": e, "frame_index": t,
            "timestamp": t / FPS, "index": sum(LENGTHS[:e]) + t, "task_index": 0,
            **({CAMERA: {"bytes": png(picture(e, t)), "path": f"frame_{t:06d}.png"}} if dtype == "image" else {}),
        }
        for e, length in enumerate(LENGTHS) for t in range(length)
    ]  # fmt: skip
    (folder / "meta").mkdir(parents=True)
    files = {"data/chunk-000/file-000.parquet": rows[:19], "data/chunk-000/file-001.parquet": rows[19:]}
    if not is_v3:
        files = {f"data/chunk-{e // 2:03d}/episode_{e:06d}.parquet": [r for r in rows if r["episode_index"] == e]
                 for e in range(3)}  # fmt: skip
    for name, part in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(part), folder / name, row_group_size=4)
    if dtype == "video" and is_v3:
        write_video(folder / "videos" / CAMERA / "chunk-000" / "file-000.mp4", [0, 1])
        write_video(folder / "videos" / CAMERA / "chunk-000" / "file-001.mp4", [2])
        begins = [0.0, LENGTHS[0] / FPS, 0.0]
        meta = [
            {"episode_index": e, "length": LENGTHS[e], f"videos/{CAMERA}/chunk_index": 0,
             f"videos/{CAMERA}/file_index": int(e == 2), f"videos/{CAMERA}/from_timestamp": begins[e],
             f"videos/{CAMERA}/to_timestamp": begins[e] + LENGTHS[e] / FPS}
            for e in range(3)
        ]  # fmt: skip
        (folder / "meta/episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(meta), folder / "meta/episodes/chunk-000/file-000.parquet")
    elif dtype == "video":
        for e in range(3):
            write_video(folder / f"videos/chunk-{e // 2:03d}" / CAMERA / f"episode_{e:06d}.mp4", [e])
    info = {
        "codebase_version": version, "fps": FPS, "chunks_size": 2 if not is_v3 else 1000,
        "splits": splits or {"train": "0:3"},
        "data_path": next(iter(files)),
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4" if is_v3
        else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {CAMERA: {"dtype": dtype, "shape": [32, 32, 3]}, "action": {"dtype": "float32", "shape": [2]},
                     "observation.state": {"dtype": "float32", "shape": [2]}},
    }  # fmt: skip
    (folder / "meta/info.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
@pytest.mark.parametrize("dtype", ["image", "video"])
def test_every_layout_gives_the_same_episodes(tmp_path, version, dtype):
    videos = open_videos(dataset(tmp_path / "pusht", version=version, dtype=dtype))
    assert [video.name for video in videos] == ["episode_000000", "episode_000001", "episode_000002"]
    for e, video in enumerate(videos):
        assert len(video) == LENGTHS[e] and video.fps == FPS
        expected = np.stack([picture(e, t) for t in range(LENGTHS[e])])
        frames = video.frames()
        assert frames.shape == expected.shape
        difference = np.abs(frames.astype(int) - expected)
        assert difference.max() == 0 if dtype == "image" else difference.mean() < 6
        columns = video.columns()
        assert set(columns) == {"actions", "proprio"}
        np.testing.assert_array_equal(columns["proprio"], [state_of(e, t) for t in range(LENGTHS[e])])
        np.testing.assert_array_equal(columns["actions"], [action_of(e, t) for t in range(LENGTHS[e])])
    # any part of an episode, in small blocks
    part = np.concatenate(list(videos[1].chunks(2, start=3, stop=11, stride=3)))
    expected = np.stack([picture(1, t) for t in (3, 6, 9)])
    assert np.abs(part.astype(int) - expected).mean() < 6


def test_extraction_turns_it_into_a_slot_dataset(tmp_path):
    source = dataset(tmp_path / "pusht", version="v3.0", splits={"train": "0:2", "val": "2:3"})
    encoder = ColorIsaModel(ColorIsaConfig(image_size=32, num_slots=4, slot_size=32))
    folder = extract_slots(source, encoder, tmp_path / "slots", progress=False)
    train, validation = load_slot_dataset(folder), load_slot_dataset(folder, "validation")
    assert train.lengths.tolist() == [7, 12] and validation.lengths.tolist() == [5]
    assert train.metadata["fps"] == FPS and set(train.columns) == {"slots", "actions", "proprio"}
    np.testing.assert_allclose(np.asarray(train.data[1]["proprio"])[:, 0], 100 + np.arange(12))


def test_several_cameras_need_a_choice_which_extraction_takes(tmp_path):
    folder = dataset(tmp_path / "robot")
    info = json.loads((folder / "meta/info.json").read_text())
    info["features"]["observation.images.wrist"] = {"dtype": "video", "shape": [32, 32, 3]}
    (folder / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"observation\.images\.wrist.*camera="):
        open_source(folder)
    with pytest.raises(ValueError, match="no camera 'top'"):
        open_lerobot(folder, camera="top")
    opened = open_source(open_lerobot(folder, camera=CAMERA))
    assert [len(v) for v in opened.splits["train"]] == list(LENGTHS)


def test_damage_is_named(tmp_path):
    folder = dataset(tmp_path / "a")
    info = json.loads((folder / "meta/info.json").read_text())
    (folder / "meta/info.json").write_text(json.dumps({**info, "codebase_version": "v1.6"}))
    with pytest.raises(ValueError, match=r"version v1\.6"):
        open_source(folder)
    (folder / "meta/info.json").write_text("{")
    with pytest.raises(ValueError, match=r"info\.json is damaged"):
        open_source(folder)
    (folder / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="no split"):
        open_source(folder, splits=["test"])
    file = folder / "data/chunk-000/episode_000001.parquet"
    table = pq.read_table(file)
    pq.write_table(table.take(list(range(11, -1, -1))), file)
    with pytest.raises(ValueError, match="episode 1 are not its frames"):
        open_source(folder)


def test_a_video_that_is_cut_off_or_missing_is_a_damaged_episode(tmp_path):
    pytest.importorskip("av")
    folder = dataset(tmp_path / "a", dtype="video")
    write_video(folder / "videos/chunk-000" / CAMERA / "episode_000001.mp4", [0])
    (folder / "videos/chunk-001" / CAMERA / "episode_000002.mp4").unlink()
    videos = open_videos(folder)
    with pytest.raises(ValueError, match="ends after 7 of the episode's 12 frames"):
        videos[1].frames()
    with pytest.raises(ValueError, match="is missing"):
        videos[2].frames()
