"""Every kind of source gives the same frames, names and columns; what is wrong with a video is said."""

import io
import itertools
import re
import shutil
import struct
import tarfile
from fractions import Fraction

import datasets
import numpy as np
import pytest
from datasets import Array2D, Array4D, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PilImage

from cjepa_hf.data.video import VideoFile, _rgb, open_source, open_videos

av = pytest.importorskip("av")
H, W, T = 16, 32, 5


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def frames(seed=0, length=T):
    """Blocks of one color, which a lossy codec keeps."""
    colors = np.random.default_rng(seed).integers(0, 256, (length, H // 8, W // 8, 3), dtype=np.uint8)
    return colors.repeat(8, axis=1).repeat(8, axis=2)


def columns(seed=0, length=T):
    random = np.random.default_rng(seed)
    return {
        "actions": random.normal(size=(length, 2)).astype("f4"),
        "state": random.normal(size=(length, 7)).astype("f4"),
    }


def write_video(path, array, *, codec="ffv1", pixels="bgr0", options=None, fps=25, gop=None):
    """Lossless unless asked otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *array.shape[1:3], pixels
        if gop:
            stream.codec_context.gop_size = gop
        for frame in array:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels)))
        container.mux(stream.encode())
    return path


def pictures(folder, array, mode="RGB"):
    folder.mkdir(parents=True)
    for t, frame in enumerate(array):
        PilImage.fromarray(frame).convert(mode).save(folder / f"{t}.png")
    return folder


def check(video, name, expected, beside=None):
    assert video.name == name and len(video) == len(expected)
    np.testing.assert_array_equal(video.frames(), expected)
    parts = list(video.chunks(2, start=1, stop=5, stride=2))
    assert all(part.dtype == np.uint8 and len(part) <= 2 for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts), expected[1:5:2])
    found = video.columns()
    assert found.keys() == (beside or {}).keys()
    for key, value in (beside or {}).items():
        np.testing.assert_allclose(found[key], value, rtol=1e-6)


def test_a_video_file_gives_its_frames_exactly_and_its_rate(tmp_path):
    path = write_video(tmp_path / "a.mkv", frames(), fps=30)
    (video,) = open_videos(path)
    check(video, "a", frames())
    assert video.fps == 30 and video.path == path


def test_an_mp4_announces_its_frames_and_decodes_to_nearly_the_same(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames(length=40), codec="libx264", pixels="yuv444p", options={})
    (video,) = open_videos(path)
    assert len(video) == 40 and np.abs(video.frames().astype(int) - frames(length=40)).mean() < 8


def test_long_videos_are_streamed_in_order(tmp_path):
    array = frames(length=70)
    (video,) = open_videos(write_video(tmp_path / "a.mkv", array))
    parts = list(video.chunks(32))
    assert [len(part) for part in parts] == [32, 32, 6]
    np.testing.assert_array_equal(np.concatenate(parts), array)


@pytest.mark.parametrize(
    "layout, inside",
    [
        ("videos/{split}/video_{split}/video_00000-01000/video_{n:05d}.mkv", ""),
        ("videos/{split}/video_{n:05d}.mkv", ""),
        ("{split}/video_{n:05d}.mkv", ""),
        ("video_{split}/video_00000-01000/video_{n:05d}.mkv", ""),
        ("videos/{split}/video_{n:05d}.mkv", "videos"),
    ],
)
def test_all_variants_of_clevrer_are_found(tmp_path, layout, inside):
    for split, numbers in {"train": (0, 1), "validation": (10000,), "test": (15000,)}.items():
        for n in numbers:
            write_video(tmp_path / layout.format(split=split, n=n), frames(n, 2))
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "train.json").write_text("[]")
    (tmp_path / "annotation_train").mkdir()
    (tmp_path / "annotation_train" / "annotation_00000.json").write_text("{}")
    source = open_source(tmp_path / inside)
    assert {split: [v.name for v in videos] for split, videos in source.splits.items()} == {
        "train": ["video_00000", "video_00001"], "test": ["video_15000"], "validation": ["video_10000"],
    }  # fmt: skip
    np.testing.assert_array_equal(source.splits["validation"][0].frames(), frames(10000, 2))
    assert [v.name for v in open_videos(tmp_path / inside, "test")] == ["video_15000"]
    with pytest.raises(ValueError, match=r"has the splits .* name one of them"):
        open_videos(tmp_path / inside)
    with pytest.raises(ValueError, match=r"no split \['dev'\]"):
        open_videos(tmp_path / inside, "dev")


def test_val_is_called_validation_and_a_split_folder_can_be_given_alone(tmp_path, caplog):
    write_video(tmp_path / "clips_val" / "b.mkv", frames())
    write_video(tmp_path / "more" / "c.mkv", frames())
    assert list(open_source(tmp_path).splits) == ["validation"] == list(open_source(tmp_path / "clips_val").splits)
    assert "what lies beside them is not read: more" in caplog.text  # never silently


def test_stems_that_repeat_are_told_apart_by_their_folders(tmp_path):
    for folder, seed in (("x", 1), ("y", 2)):
        write_video(tmp_path / folder / "a.mkv", frames(seed))
    write_video(tmp_path / "x" / "b10.mkv", frames(3))
    write_video(tmp_path / "x" / "b9.mkv", frames(4))
    assert [v.name for v in open_videos(tmp_path)] == ["b9", "b10", "x/a", "y/a"]


def test_image_folders_are_read_in_natural_order_with_what_lies_beside(tmp_path):
    beside = columns(length=12)
    folder = pictures(tmp_path / "000", frames(length=12))
    np.save(folder / "actions.npy", beside["actions"][:-1])
    np.save(folder / "state.npy", beside["state"])
    np.save(folder / "segments.npy", np.ones((12, H, W), int))
    pictures(tmp_path / "001", frames(1))
    first, second = open_videos(tmp_path)
    beside["actions"][-1] = np.nan  # nothing was done after the last frame
    check(first, "000", frames(length=12), beside)
    check(second, "001", frames(1))
    assert first.segments().sum() == 12 * H * W and second.segments() is None


def test_numpy_files(tmp_path):
    np.save(tmp_path / "a.npy", frames())
    np.save(tmp_path / "a.actions.npy", columns()["actions"])
    np.savez(tmp_path / "b.npz", frames=frames(1), **columns(1))
    first, second = open_videos(tmp_path)
    check(first, "a", frames(), {"actions": columns()["actions"]})
    check(second, "b", frames(1), columns(1))


def swm_folder(folder, episodes):
    rows = {key: [] for key in ("episode_idx", "step_idx", "pixels", "action", "proprio", "state")}
    for number, length in episodes.items():
        write_video(folder / "videos" / f"{number}_pixels.mkv", frames(number, length))
        for step in reversed(range(length)):  # order is by step_idx, not by row
            values = columns(number, length)
            rows["episode_idx"].append(number)
            rows["step_idx"].append(step)
            rows["pixels"].append(f"videos/{number}_pixels.mkv")
            rows["action"].append(values["actions"][step].tolist())
            rows["proprio"].append(values["state"][step, :4].tolist())
            rows["state"].append(values["state"][step].tolist())
    Dataset.from_dict(rows).save_to_disk(folder)


def test_folders_of_stable_worldmodel(tmp_path):
    swm_folder(tmp_path / "pusht_expert_train", {0: 3, 1: 5})
    swm_folder(tmp_path / "pusht_expert_val", {7: 4})
    splits = open_source(tmp_path).splits
    assert {s: [v.name for v in videos] for s, videos in splits.items()} == {"train": ["0", "1"], "validation": ["7"]}
    values = columns(1, 5)
    beside = {"actions": values["actions"], "proprio": values["state"][:, :4], "state": values["state"]}
    check(open_videos(tmp_path / "pusht_expert_train")[1], "1", frames(1, 5), beside)


@pytest.mark.parametrize("layout", ["THWC", "TCHW"])
def test_hdf5_of_stable_worldmodel(tmp_path, layout):
    h5py = pytest.importorskip("h5py")
    pixels = np.concatenate([frames(0, 3), frames(1, 5)])
    with h5py.File(tmp_path / "pusht_train.h5", "w") as file:
        file["pixels"] = pixels if layout == "THWC" else pixels.transpose(0, 3, 1, 2)
        file["action"] = np.concatenate([columns(0, 3)["actions"], columns(1, 5)["actions"]])
        file["ep_len"], file["ep_offset"] = [3, 5], [0, 3]
    second = open_videos(tmp_path / "pusht_train.h5", "train")[1]
    check(second, "1", frames(1, 5), {"actions": columns(1, 5)["actions"]})
    assert len(open_videos(tmp_path)) == 2


@pytest.mark.parametrize("suffix", ["mkv", "webm"])  # `datasets` knows one of them for a video's
def test_webdataset_shards(tmp_path, suffix):
    for shard, numbers in enumerate([(0, 1), (2,)]):
        (tmp_path / "train").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "train" / f"shard-{shard}.tar", "w") as tar:
            for number in numbers:
                data = write_video(tmp_path / "one.mkv", frames(number)).read_bytes()
                actions = io.BytesIO()
                np.save(actions, columns(number)["actions"])
                for name, content in ((suffix, data), ("actions.npy", actions.getvalue())):
                    entry = tarfile.TarInfo(f"clip{number}.{name}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    (tmp_path / "one.mkv").unlink()
    for number, video in itertools.zip_longest(range(3), open_videos(tmp_path)):
        check(video, f"clip{number}", frames(number), {"actions": columns(number)["actions"]})


def test_an_empty_shard_is_named(tmp_path):
    (tmp_path / "shard-0.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"the shards \['shard-0.tar'\] cannot be read \(empty file"):
        open_videos(tmp_path)


@pytest.mark.parametrize("kind", ["pictures", "array", "video"])
def test_rows_of_datasets(tmp_path, kind):
    values = [frames(seed) for seed in range(2)]
    if kind == "video":
        data = {"clip": [str(write_video(tmp_path / f"v{i}.mkv", v)) for i, v in enumerate(values)]}
        data, names = Dataset.from_dict(data).cast_column("clip", datasets.Video()), ["v0", "v1"]
    else:
        names, is_list = ["x", "y"], kind == "pictures"
        feature = List(Image()) if is_list else Array4D((None, H, W, 3), "uint8")
        features = Features(
            {"episode_id": Value("string"), "frames": feature, "actions": Array2D((None, 2), "float32")}
        )
        content = [[PilImage.fromarray(f) for f in v] for v in values] if is_list else values
        rows = {"episode_id": names, "frames": content, "actions": [columns(i)["actions"] for i in range(2)]}
        data = Dataset.from_dict(rows, features=features)
    for source in (data, DatasetDict(train=data)):
        for i, video in enumerate(open_videos(source)):
            check(video, names[i], values[i], None if kind == "video" else {"actions": columns(i)["actions"]})
    swapped = open_videos(data.select([1, 0]))
    check(swapped[0], names[1], values[1], None if kind == "video" else {"actions": columns(1)["actions"]})


def test_gray_is_repeated_and_an_opaque_alpha_channel_dropped(tmp_path):
    gray = frames()[..., 0]
    pictures(tmp_path / "i" / "gray", gray, "L")
    pictures(tmp_path / "i" / "opaque", frames(), "RGBA")
    pictures(tmp_path / "i" / "palette", gray, "P")
    np.save(tmp_path / "i" / "no_axis.npy", gray)
    write_video(tmp_path / "i" / "video.mkv", gray[..., None].repeat(3, -1), pixels="gray")
    found = {video.name: video.frames() for video in open_videos(tmp_path / "i")}
    expected = gray[..., None].repeat(3, -1)
    for name in ("gray", "palette", "no_axis", "video"):
        np.testing.assert_array_equal(found[name], expected)
    np.testing.assert_array_equal(found["opaque"], frames())


@pytest.mark.parametrize(
    "block, message",
    [
        (np.zeros((T, 3, H, W), np.uint8), "channels first: move axis 1 to the end"),
        (np.zeros((T, H, W, 3), np.float32), "float32 .*expected uint8 RGB.*multiply by 255"),
        (np.zeros((H, W, 3), np.uint8), "as one picture has"),
        (np.zeros((T, H, W, 4), np.uint8), "transparent"),
        (np.zeros((T, H, W, 2), np.uint8), r"shape \(5, 16, 32, 2\); expected"),
        ([np.zeros((H, W, 3), np.uint8), np.zeros((W, H, 3), np.uint8)], "different shapes"),
    ],
)
def test_frames_that_are_not_rgb_pictures_are_refused(block, message):
    with pytest.raises(ValueError, match=message):
        _rgb(block)


def test_pictures_of_16_bits_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    PilImage.fromarray(np.full((H, W), 40000, np.uint16)).save(tmp_path / "a" / "0.png")
    with pytest.raises(ValueError, match="mode 'I;16'"):
        open_videos(tmp_path)[0].frames()


def test_a_video_of_one_frame_is_a_video(tmp_path):
    (video,) = open_videos(write_video(tmp_path / "a.mkv", frames(length=1)))
    assert video.frames().shape == (1, H, W, 3)


def test_damaged_and_empty_videos_say_what_is_wrong(tmp_path):
    whole = write_video(
        tmp_path / "whole.mp4", frames(length=40), codec="libx264", pixels="yuv420p",
        options={"movflags": "faststart"},
    ).read_bytes()  # fmt: skip
    folder = tmp_path / "v"
    folder.mkdir()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video")
    damaged = bytearray(whole)
    damaged[len(whole) * 2 // 3 : len(whole) * 2 // 3 + 200] = bytes(200)
    (folder / "zeros.mp4").write_bytes(damaged)
    messages = {}
    for video in open_videos(folder):
        with pytest.raises((ValueError, OSError)) as error:
            video.frames()
        messages[video.name] = str(error.value)
    assert "damaged after frame" in messages["zeros"]
    assert "cannot be opened as a video" in messages["text"] and "cannot be opened as a video" in messages["empty"]
    assert "damaged after" in messages["cut"] or "cut off" in messages["cut"]
    assert str(tmp_path) not in str(messages)  # published datasets quote them


@pytest.mark.parametrize("with_tag", [True, False])
def test_a_matroska_file_that_was_cut_off_is_not_taken_for_a_shorter_video(tmp_path, with_tag):
    noise = np.random.default_rng(0).integers(0, 256, (60, H, W, 3), dtype=np.uint8)
    whole = write_video(tmp_path / "a.mkv", noise).read_bytes()
    if not with_tag:  # of the stream's duration: other programs write none
        whole = whole.replace(b"DURATION", b"OTHERTAG")
        (tmp_path / "a.mkv").write_bytes(whole)
    (video,) = open_videos(tmp_path / "a.mkv")
    assert len(video) == 60 and video.fps == 25  # no count, but a duration
    np.testing.assert_array_equal(video.frames(), noise)
    (tmp_path / "b.mkv").write_bytes(whole[: len(whole) // 2])
    (video,) = open_videos(tmp_path / "b.mkv")
    with pytest.raises(ValueError, match=r"ends after 1\.\d\d of 2\.40 seconds: it was cut off"):
        video.frames()


GROUPS = {"libx264": {"g": "6", "bf": "3"}, "libvpx-vp9": {"g": "6", "cpu-used": "5", "deadline": "realtime"}}
GROUPS["libx265"] = {"x265-params": "keyint=6:log-level=none:pools=1"}
GROUPS["libsvtav1"] = {"preset": "12", "svtav1-params": "keyint=6"}


def write_groups(path, codec="libx264", times=None, length=48, **options):
    """A moving picture in groups of six frames, shown at `times` (ms)."""
    scene = frames(length=1)[0].repeat(4, axis=0).repeat(4, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=GROUPS.get(codec, {}) | options)
        stream.height, stream.width, stream.pix_fmt = *scene.shape[:2], "yuv420p"
        unit = stream.codec_context.time_base = Fraction(1, 1000 if times else 25)
        for t in range(length):
            frame = av.VideoFrame.from_ndarray(np.roll(scene, (2 * t, 3 * t), (0, 1)), format="rgb24")
            frame.pts, frame.time_base = times[t] if times else t, unit
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())
    return path


def trimmed(path, count):
    """The edit list of an mp4 leaves out its first `count` frames."""
    content = bytearray(path.read_bytes())
    start, scale = content.index(b"elst") + 16, content.index(b"mdhd") + 16
    ticks = struct.unpack(">I", content[scale : scale + 4])[0] * count // 25
    struct.pack_into(">i", content, start, struct.unpack_from(">i", content, start)[0] + ticks)
    path.write_bytes(content)
    return path


@pytest.fixture
def decoded(monkeypatch):
    """Counts the frames that are decoded: the number in its first place."""
    count = [0]

    class Counting:
        def __init__(self, of):
            self.of = of

        def __getattr__(self, name):
            return getattr(self.of, name)

        def __bytes__(self):
            return bytes(self.of)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return self.of.__exit__(*error)

        def demux(self, stream):
            return map(Counting, self.of.demux(stream))

        def decode(self):
            found = self.of.decode()
            count[0] += len(found)
            return found

    opened = VideoFile._open
    monkeypatch.setattr(VideoFile, "_open", lambda video: Counting(opened(video)))
    return count


IRREGULAR = np.cumsum([33, 40, 7, 400, 55, 33] * 8).tolist()
LATE = [5000 + 40 * t for t in range(48)]


@pytest.mark.parametrize(
    "name, options, jumps",
    [
        ("a.mp4", {}, True),
        ("a.mkv", {}, True),
        ("a.webm", {"codec": "libvpx-vp9"}, True),
        ("open.mp4", {"codec": "libx265"}, True),  # frames that are shown before the key frame they come after
        ("new.mkv", {"codec": "libsvtav1"}, True),
        ("irregular.mp4", {"times": IRREGULAR}, True),
        ("irregular.mkv", {"times": IRREGULAR}, True),
        ("irregular.webm", {"codec": "libvpx-vp9", "times": IRREGULAR}, True),
        ("late.mp4", {"times": LATE}, True),
        ("late.mkv", {"times": LATE}, True),
        ("trim2.mp4", {}, True),  # within the first group
        ("trim9.mp4", {}, True),  # of which the first group is no part
        ("refresh.mp4", {"x264-params": "intra-refresh=1"}, False),  # its key frames are not whole
        ("between.mp4", {"x264-params": "open-gop=1:scenecut=0"}, False),  # H.264 does not say that they end a group
        ("one.mp4", {"g": "99"}, False),
        ("old.webm", {"codec": "libvpx", "g": "6"}, False),
        ("a.avi", {}, False),  # without times
    ],
)
def test_any_window_is_decoded_from_a_key_frame_and_equal_to_that_of_the_whole(
    tmp_path, decoded, name, options, jumps
):
    path = write_groups(tmp_path / name, **options)
    trim = int(re.sub(r"\D", "", name.removesuffix(".mp4")) or 0)
    path = trimmed(path, trim) if trim else path
    (video,) = open_videos(path)
    whole = video.frames()
    assert len(whole) == 48 - trim == video.counted
    decoded[0], from_the_beginning = 0, 0
    random = np.random.default_rng(0)
    for _ in range(40):
        count, stride = random.integers(1, 5), random.integers(1, 4)
        start = random.integers(0, len(whole) - (count - 1) * stride)
        stop = start + (count - 1) * stride + 1
        if random.random() < 0.3:
            (video,) = open_videos(path)  # which knows nothing yet
        np.testing.assert_array_equal(video.frames(start, stop, stride), whole[start:stop:stride])
        from_the_beginning += stop
    assert (decoded[0] < 0.8 * from_the_beginning) if jumps else (decoded[0] >= from_the_beginning)


def test_a_window_of_a_long_video_reads_no_more_than_it_needs(tmp_path, decoded):
    (video,) = open_videos(write_groups(tmp_path / "a.mp4", length=120))
    video.frames(60, 62)
    assert decoded[0] <= 12 and 62 <= len(video._index.times) < 90  # one group, and packets up to it
    with pytest.raises(ValueError, match="no frame 130"):
        video.frames(130, 132)
    assert video.frames(118, 140).shape[0] == 2 and video.counted == 120


def test_windows_of_a_file_that_was_cut_off_are_those_before_the_cut(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (48, H, W, 3), dtype=np.uint8)
    content = write_video(tmp_path / "a.mp4", noise, codec="libx264", pixels="yuv420p", gop=6,
                          options={"movflags": "faststart"}).read_bytes()  # fmt: skip
    whole = open_videos(tmp_path / "a.mp4")[0].frames()
    (tmp_path / "a.mp4").write_bytes(content[: len(content) * 3 // 4])
    (video,) = open_videos(tmp_path / "a.mp4")
    np.testing.assert_array_equal(video.frames(14, 20), whole[14:20])
    for start in (32, 40):
        with pytest.raises(ValueError, match=r"damaged after frame 3|cut off"):
            video.frames(start, start + 6)


def test_a_file_whose_packets_lie_is_read_from_its_beginning(tmp_path):
    path = write_groups(tmp_path / "a.mp4")
    (video,) = open_videos(path)
    whole = video.frames()
    wrong = video._index_to(30)
    for times in (wrong.times + (np.arange(len(wrong.times)) > 21), wrong.times + 1):
        (video,) = open_videos(path)
        video._index = wrong._replace(times=times)
        np.testing.assert_array_equal(video.frames(20, 30), whole[20:30])
        assert video._index is None


def test_frames_of_a_turned_phone_are_upright(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames(), codec="libx264", pixels="yuv444p")
    (video,) = open_videos(path)
    content, expected = bytearray(path.read_bytes()), np.rot90(video.frames(), -1, (1, 2))
    matrix = content.index(b"tkhd") + 44  # 9 fixed-point numbers of the track's header: here, turn clockwise
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    (turned,) = open_videos(path)
    np.testing.assert_array_equal(turned.frames(), expected)


def test_places_without_videos_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no videos: expected video files"):
        open_source(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="is not a video that is read here"):
        open_source(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match="no folder"):
        open_source(tmp_path / "b")
    PilImage.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="is one picture: give the folder"):
        open_source(tmp_path / "a.png")
    (video,) = open_videos(write_video(tmp_path / "v" / "a.mkv", frames()))
    for arguments in ((5, 5), (0, None, 0), (-1,)):
        with pytest.raises(ValueError, match="expected size and stride"):
            video.frames(*arguments)
    with pytest.raises(ValueError, match="no frame 9"):
        video.frames(9)


def test_a_damaged_parquet_file_is_named(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    features = Features({"frames": Array4D((None, H, W, 3), "uint8")})
    for number in range(2):
        path = folder / f"train-{number:05d}-of-00002.parquet"
        random = np.random.default_rng(0).integers(0, 255, (50, H, W, 3), dtype=np.uint8)
        Dataset.from_dict({"frames": [random]}, features=features).to_parquet(path)
    content = bytearray(path.read_bytes())
    content[2000:3000] = bytes(1000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet is damaged"):
        open_source(tmp_path)
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet is damaged"):
        open_source(tmp_path)


def test_content_changes_with_the_files_but_not_with_their_place(tmp_path):
    first = open_source(write_video(tmp_path / "x" / "a.mkv", frames()).parent).content("train")
    same = open_source(shutil.copytree(tmp_path / "x", tmp_path / "y")).content("train")
    other = open_source(write_video(tmp_path / "z" / "a.mkv", frames(1)).parent).content("train")
    assert first == same != other
    rows = [open_source(Dataset.from_dict({"frames": [[PilImage.fromarray(f) for f in frames(s)]]}, features=Features(
        {"frames": List(Image())}))).content("train") for s in (0, 0, 1)]  # fmt: skip
    assert rows[0] == rows[1] != rows[2]
