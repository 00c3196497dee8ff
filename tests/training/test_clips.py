"""Clips that video encoders train on: windows of videos, Push-T with every object moving, damage, recipes."""

import json
import logging
import tarfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cjepa_hf.data.collect import collect_push_t
from cjepa_hf.data.video import FrameVideo, open_videos
from cjepa_hf.models.savi import SaviConfig, SaviImageProcessor
from cjepa_hf.models.videosaur import VideoSaurConfig
from cjepa_hf.training.arguments import config_arguments, config_overrides, parse_arguments
from cjepa_hf.training.clips import (
    ClipCollate,
    ClipTrainArguments,
    RandomPushT,
    VideoClips,
    check_num_slots,
    clip_metrics,
    open_clips,
    random_motion,
)
from cjepa_hf.training.savi import SaviTrainArguments
from cjepa_hf.training.savi import main as train_savi
from cjepa_hf.training.videosaur import VideoSaurTrainArguments

EXAMPLES = Path(__file__).parents[2] / "examples"


def video(name: str, length: int, *, broken: bool = False) -> FrameVideo:
    """Every pixel of frame t is t; the left column of pixels is 200 + t."""
    frames = np.broadcast_to(np.arange(length, dtype=np.uint8)[:, None, None, None], (length, 4, 6, 3)).copy()
    frames[:, :, 0] += 200

    def opener():
        if broken:
            raise OSError("torn")
        return frames.__getitem__

    segments = np.zeros((length, 4, 6), int)
    segments[:, :, 0] = 1
    return FrameVideo(opener, length, name, segments=lambda: segments)


def write_video(path: Path, length: int, times: list[int] | None = None) -> Path:
    """A gray ramp of 16 x 24 pixels, shown at `times` (ms)."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25 if times else 10)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        stream.width, stream.height, stream.pix_fmt = 24, 16, "yuv420p"
        for t in range(length):
            frame = np.full((16, 24, 3), 20 * t, np.uint8)
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")
            if times:
                frame.pts, frame.time_base = times[t], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_every_window_of_every_video_is_a_clip():
    clips = VideoClips([video("a", 7), video("b", 3), video("c", 5)], clip_length=3, stride=2)
    assert len(clips) == 3 + 0 + 1  # spans of 5 frames
    found = [clips[i]["frames"] for i in range(len(clips))]
    assert all(frames.shape == (3, 4, 6, 3) and frames.dtype == np.uint8 for frames in found)
    assert [frames[:, 0, 1, 0].tolist() for frames in found] == [[0, 2, 4], [1, 3, 5], [2, 4, 6], [0, 2, 4]]
    with pytest.raises(ValueError, match=r"none of 2 videos has the 9 frames of a clip .*the longest has 7"):
        VideoClips([video("a", 7), video("b", 3)], clip_length=5, stride=2)


def test_windows_are_of_frames_that_exist_where_a_file_announces_too_many(tmp_path, caplog):
    # of 25 frames a second, with a long pause
    write_video(tmp_path / "pause.mkv", 12, times=[*range(0, 400, 40), 1000, 2000])
    (pause,) = open_videos(tmp_path)
    assert len(pause) > 40
    clips = VideoClips([pause], clip_length=3, stride=2)
    starts = [int(clips[i]["frames"][0].mean() / 20 + 0.5) for i in range(len(clips))]
    assert len(clips) > 36 and starts == [i % 8 for i in range(len(clips))] and not caplog.text
    clips = VideoClips([pause, video("whole", 60)], clip_length=20)
    assert clips[2]["frames"].shape == (20, 4, 6, 3) == clips[1]["frames"].shape
    assert caplog.text.count("has 12, fewer than the 20 of a clip") == 1
    with pytest.raises(ValueError, match="none of the 1 videos can be read: pause"):
        VideoClips([pause], clip_length=20)[0]


def test_flips_mirror_frames_and_masks_of_whole_clips():
    clips = VideoClips([video("a", 9)], clip_length=2, flip=0.5, segments=True)
    np.random.seed(0)
    mirrored = []
    for i in [*range(8)] * 8:
        clip = clips[i]
        left, right = clip["frames"][:, 0, 0, 0] >= 200, clip["frames"][:, 0, -1, 0] >= 200
        assert (left != right).all() and left[0] == left[1]
        assert (clip["segments"][:, 0, 0] == left).all() and (clip["segments"][:, 0, -1] == right).all()
        mirrored.append(bool(right[0]))
    assert 16 < sum(mirrored) < 48


def test_a_damaged_video_is_named_once_and_another_takes_its_place(caplog):
    clips = VideoClips([video("torn-one", 4, broken=True), video("whole", 4)], clip_length=2)
    with caplog.at_level(logging.WARNING):
        first, again = clips[1]["frames"], clips[2]["frames"]
    assert first[:, 0, 1, 0].tolist() == [1, 2] and again[:, 0, 1, 0].tolist() == [2, 3]
    assert [r.getMessage() for r in caplog.records] == ["video torn-one is damaged and passed over: torn"]
    with pytest.raises(ValueError, match="none of the 1 videos can be read: torn-one"):
        VideoClips([video("torn-one", 4, broken=True)], clip_length=2)[0]


def test_videos_that_cannot_even_be_opened_are_named_and_left_out(tmp_path, caplog):
    path = write_video(tmp_path / "train" / "whole.mp4", 4)
    (tmp_path / "train" / "cut.mp4").write_bytes(path.read_bytes()[:300])
    (tmp_path / "train" / "empty.mp4").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        clips = VideoClips(open_videos(tmp_path, "train"), clip_length=3, segments=True)
    assert len(clips) == 2 and clips[1]["frames"].shape == (3, 16, 24, 3)
    assert [r.getMessage().split(" is ")[0] for r in caplog.records] == ["video cut", "video empty"]
    path.unlink()
    with pytest.raises(ValueError, match=r"none of 2 videos .* damaged: cut, empty"):
        VideoClips(open_videos(tmp_path, "train"), clip_length=3)


def test_masks_are_those_of_the_readable_videos():
    def unknown():
        raise ValueError("state is not finite at frame 2")

    def clips(*first):
        return VideoClips([*first, video("known", 4)], clip_length=2, segments=True)

    broken, without = video("broken", 2), video("without", 2)
    broken._segments, without._segments = unknown, lambda: None
    assert [clips(broken)[i]["segments"].shape for i in (0, 1)] == [(2, 4, 6)] * 2
    assert not clips(without).segments and clips().segments


def test_a_missing_decoder_is_no_damage():
    def opener():
        raise ImportError("reading this source needs the package av")

    with pytest.raises(ImportError, match="package av"):
        VideoClips([FrameVideo(opener, 4, "a")], clip_length=2)[0]


@pytest.mark.parametrize("kind", ["mp4", "tar"])
def test_training_runs_on_video_files_and_on_tar_shards(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "validation"):
        files = [write_video(tmp_path / "videos" / split / f"video_{i}.mp4", 5) for i in range(2)]
        if kind == "tar":
            (tmp_path / "shards" / split).mkdir(parents=True)
            with tarfile.open(tmp_path / "shards" / split / "shard-0.tar", "w") as tar:
                for file in files:
                    tar.add(file, arcname=file.name)
    source = tmp_path / ("videos" if kind == "mp4" else "shards")
    words = """--num_slots 2 --slot_size 8 --image_size 16 --encoder_channels 4,4 --slot_mlp_size 8 --decoder_channels 4,4
    --decoder_grid_size 4 --batch_size 4 --clip_length 3 --max_steps 2 --log_every 1 --use_cpu"""
    result = train_savi([*words.split(), "--dataset", str(source), "--output_dir", str(tmp_path / "run")])
    assert result.step == 2 and result.metrics["reconstruction_loss"] > 0 and "foreground_ari" not in result.metrics
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["data_length"] == 2 * 3
    assert json.loads((tmp_path / "run" / "training_results.json").read_text())["dataset"] == source.name


def test_in_random_push_t_all_three_objects_move_and_stay_on_the_table():
    states, goals = zip(*(random_motion(40, np.random.default_rng(seed)) for seed in range(30)))
    states, goals = np.stack(states), np.stack(goals)
    assert states.shape == (30, 40, 5) and goals.shape == (30, 40, 3)
    for poses, low, high in ((states[..., :2], 25, 487), (states[..., 2:4], 120, 390), (goals[..., :2], 110, 400)):
        steps = np.linalg.norm(np.diff(poses, axis=1), axis=-1)
        assert (steps.mean(axis=1) > 1).all() and steps.max() < 60
        assert poses.min() >= low - 1e-6 and poses.max() <= high + 1e-6
        assert poses.std(axis=(0, 1)).min() > 0.15 * (high - low)  # anywhere
    assert (np.abs(np.diff(states[..., 4], axis=1)).mean(axis=1) > 1e-3).all()


def test_clips_of_random_push_t_are_a_function_of_seed_and_index_and_know_their_masks():
    clips = RandomPushT(5, 3, seed=1, resolution=32, segments=True)
    clip = clips[2]
    assert clip["frames"].shape == (3, 32, 32, 3) and clip["frames"].dtype == np.uint8
    assert np.array_equal(clip["frames"], RandomPushT(9, 3, seed=1, resolution=32)[2]["frames"])
    assert not np.array_equal(clip["frames"], clips[3]["frames"])
    assert not np.array_equal(clip["frames"], RandomPushT(5, 3, seed=2, resolution=32)[2]["frames"])
    assert (clip["frames"][0] != clip["frames"][1]).any()
    strided = RandomPushT(5, 2, 2, seed=1, resolution=32)[2]["frames"]
    assert np.array_equal(strided, clip["frames"][::2])
    assert clip["segments"].shape == (3, 32, 32) and set(np.unique(clip["segments"])) <= {0, 1, 2, 3}
    seen = [np.unique(clips[i]["segments"]) for i in range(5)]
    assert set(np.concatenate(seen)) == {0, 1, 2, 3}
    # agents are blue, and labelled 1
    agent = clip["frames"][clip["segments"] == 1].astype(int)
    assert (agent[:, 2] > agent[:, 0] + 60).mean() > 0.9


def test_fewer_slots_than_objects_are_refused_before_training(tmp_path):
    words = ["--num_slots", "2", "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--batch_size", "1"]
    with pytest.raises(ValueError, match=r"num_slots=2 is fewer than the 3 objects .*give at least 4"):
        train_savi(words)
    check_num_slots(3, RandomPushT(1, 2, resolution=32, segments=True))
    check_num_slots(1, RandomPushT(1, 2, resolution=32))  # not known
    check_num_slots(1, None)


def test_a_split_that_is_not_there_is_an_error_that_says_which_argument_names_it(tmp_path):
    write_video(tmp_path / "a.mp4", 4)
    args = ClipTrainArguments(output_dir="x", dataset=str(tmp_path), clip_length=2)
    with pytest.raises(ValueError, match=r"no split \['validation'\]; it has \['train'\] .*--validation_split none"):
        open_clips(args)


def test_a_batch_holds_what_the_model_takes():
    clips = RandomPushT(4, 3, resolution=20, segments=True)
    batch = ClipCollate(SaviImageProcessor(size=16))([clips[i] for i in range(2)])
    assert batch["pixel_values"].shape == (2, 3, 3, 16, 16) and batch["pixel_values"].dtype == torch.float32
    assert batch["segments"].shape == (2, 3, 20, 20)
    single = SaviImageProcessor(size=16)(clips[1]["frames"])["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"][1], single)


def test_a_collected_data_set_is_drawn_on_the_fly_with_its_masks(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = collect_push_t(
        tmp_path / "push_t",
        num_episodes={"train": 2, "validation": 1},
        episode_length=10,
        num_workers=1,
        progress=False,
    )
    args = ClipTrainArguments(output_dir="x", dataset=str(folder), clip_length=4, frame_stride=2, render_resolution=24)
    clips, eval_clips = open_clips(args)
    assert len(clips) == 2 * 5 and len(eval_clips) == 5
    assert clips[9]["frames"].shape == (4, 24, 24, 3) and "segments" not in clips[9]
    assert eval_clips[0]["segments"].shape == (4, 24, 24) and eval_clips[0]["segments"].max() > 0
    args.validation_split = "none"
    assert open_clips(args)[1] is None


def test_metrics_know_perfect_masks_and_slots_that_swap_objects():
    segments = torch.zeros(1, 2, 8, 8, dtype=torch.long)
    segments[:, :, :, 2:4], segments[:, :, :, 5:7] = 1, 2

    def model(masks):
        def forward(pixel_values, return_loss, seeds):
            assert return_loss and seeds == [0]
            return Output(loss=torch.tensor(2.0), one_loss=torch.tensor(1.0), decoder_masks=masks)

        return forward

    class Output(dict):
        __getattr__ = dict.__getitem__

    batch = {"pixel_values": torch.zeros(1, 2, 3, 8, 8), "segments": segments}
    perfect = torch.stack([(segments == k).float() for k in (1, 0, 2)], dim=2)
    values = clip_metrics(model(perfect), batch)
    assert values == {"loss": 2.0, "one_loss": 1.0, "foreground_ari": 1.0, "foreground_ari_clip": 1.0}
    swapped = perfect.clone()
    swapped[:, 1] = perfect[:, 1, [2, 1, 0]]
    values = clip_metrics(model(swapped), batch)
    assert values["foreground_ari"] == 1.0 and values["foreground_ari_clip"] < 0.1
    coarse = torch.nn.functional.interpolate(perfect[0], size=4, mode="area")[None]
    assert clip_metrics(model(coarse), batch)["foreground_ari"] > 0.3
    assert "foreground_ari" not in clip_metrics(model(perfect), {"pixel_values": batch["pixel_values"]})


RECIPES = [(path, kind) for kind in ("savi", "videosaur") for path in sorted((EXAMPLES / kind).glob("*.yaml"))]


@pytest.mark.parametrize("path, kind", RECIPES, ids=[f"{kind}/{path.name}" for path, kind in RECIPES])
def test_recipes_name_arguments_and_settings_that_exist(path, kind):
    train_class, config_class = {
        "savi": (SaviTrainArguments, SaviConfig),
        "videosaur": (VideoSaurTrainArguments, VideoSaurConfig),
    }[kind]
    args, fields = parse_arguments([train_class, config_arguments(config_class)], [str(path), "--output_dir", "x"])
    config = config_class(**config_overrides(fields))
    for name, value in yaml.safe_load(path.read_text()).items():
        if name != "backbone_config":
            assert getattr(args if hasattr(args, name) else config, name) == value


def test_the_papers_recipes_are_the_defaults_of_the_scripts():
    saur, _ = parse_arguments(
        [VideoSaurTrainArguments, config_arguments(VideoSaurConfig)],
        [str(EXAMPLES / "videosaur/push_t.yaml"), "--output_dir", "x"],
    )
    defaults = VideoSaurTrainArguments(output_dir="x")
    common = ("batch_size", "learning_rate", "weight_decay", "gradient_clip", "clip_length", "frame_stride")
    schedule = ("max_steps", "warmup_steps", "lr_scheduler", "lr_half_life")
    for name in (*common, *schedule, "flip_probability", "render_resolution", "backbone"):
        assert getattr(saur, name) == getattr(defaults, name), name
    savi, _ = parse_arguments(
        [SaviTrainArguments, config_arguments(SaviConfig)], [str(EXAMPLES / "savi/clevrer.yaml"), "--output_dir", "x"]
    )
    for name in (*common, "lr_floor"):
        assert getattr(savi, name) == getattr(SaviTrainArguments(output_dir="x"), name), name


def test_wrong_arguments_are_errors():
    for wrong in (dict(clip_length=0), dict(frame_stride=0), dict(flip_probability=1.5), dict(num_clips=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ClipTrainArguments(output_dir="x", **wrong)
