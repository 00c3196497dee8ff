"""Training of the encoder that follows objects: from videos to a folder that loads, without labels."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from cjepa_hf.data.extract import extract_slots
from cjepa_hf.data.slots import load_slot_dataset
from cjepa_hf.models.crop_slots import CropSlotsConfig, CropSlotsImageProcessor, CropSlotsModel
from cjepa_hf.models.crop_slots.modeling_crop_slots import CropSlotsTracks
from cjepa_hf.training.crop_slots import FollowedFrames, follow_videos, main, median_background
from cjepa_hf.training.trainer import read_log

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_crop_slots.py"
SIZE = 32
_TINY = f"""--num_slots 3 --slot_size 16 --image_size {SIZE} --view_size 6,6 --object_radius 0.6 --crop_size 12 --channels 4,8
--hidden_size 16 --appearance_size 4 --pose_size 2 --num_waves 4 --use_cpu --batch_size 8 --warmup_steps 5 --ema_decay 0
--log_every 5 --eval_every 0 --save_every 20 --frame_stride 2 --learning_rate 5e-3"""
TINY = _TINY.split()


def write_videos(folder: Path) -> None:
    """Two squares of random colors that move in front of a striped background: folder/train and folder/validation."""
    floor = np.full((SIZE, SIZE, 3), 120, np.uint8)
    floor[::8] = 100
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("validation", 2)):
        (folder / split).mkdir(parents=True)
        for video in range(count):
            frames = np.repeat(floor[None], 12, 0)
            for k in range(2):
                # hardly two videos with a square at the same place: the median is the floor
                color, x, speed = rng.integers(160, 255, 3), 1 + 4.5 * video, rng.uniform(0.2, 0.7)
                for t, frame in enumerate(frames):
                    left = int(x + speed * t)
                    frame[4 + 14 * k : 10 + 14 * k, left : left + 6] = color
            np.savez(folder / split / f"video_{video}.npz", frames=frames)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_videos(folder)
    return folder


def test_training_lowers_the_loss_and_leaves_an_encoder_that_extracts(videos, tmp_path, monkeypatch):
    words = [
        "train_crop_slots.py",
        *TINY,
        "--dataset",
        str(videos),
        "--output_dir",
        str(tmp_path),
        "--max_steps",
        "60",
    ]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    log = [line for line in read_log(tmp_path / "log.jsonl") if "loss" in line]
    assert log[-1]["reconstruction_loss"] < 0.5 * log[0]["reconstruction_loss"]
    results = json.loads((tmp_path / "training_results.json").read_text())
    assert results["frames"] == 30 and results["validation"]["reconstruction_loss"] < log[0]["reconstruction_loss"]
    model, processor = AutoModel.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)
    assert type(model) is CropSlotsModel and type(processor) is CropSlotsImageProcessor and processor.size == SIZE
    floor = torch.full((3, SIZE, SIZE), 120 / 255)
    floor[:, ::8] = 100 / 255
    torch.testing.assert_close(model.background, floor)

    slots = load_slot_dataset(extract_slots(videos, tmp_path, tmp_path / "slots", batch_size=10, num_videos=2))
    assert slots.metadata["encoder"]["empty_slot"] == model.empty_slot.tolist()
    frames = np.load(videos / "train" / "video_0.npz")["frames"]
    with torch.no_grad():
        whole = model.eval()(processor([frames]).pixel_values)
    assert whole.present.sum(-1).unique().tolist() == [2]
    written = torch.tensor(slots.data.with_format("numpy")[0]["slots"])
    torch.testing.assert_close(written, whole.slots[0], rtol=1e-4, atol=1e-4)
    # appearance varies as much as the configuration says
    used = model.split_slots(whole.slots)[2][whole.present]
    assert used.isfinite().all() and model.appearance_scale != 1


def test_a_run_that_was_stopped_gives_what_an_unbroken_one_gives(videos, tmp_path):
    words = [*TINY, "--dataset", str(videos), "--validation_split", "none", "--lr_scheduler", "constant"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main([*words, "--output_dir", str(whole), "--max_steps", "8"])
    main([*words, "--output_dir", str(parts), "--max_steps", "5"])
    assert main([*words, "--output_dir", str(parts), "--max_steps", "8"]).resumed_from is not None
    a, b = (CropSlotsModel.from_pretrained(folder).state_dict() for folder in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ValueError, match="was trained with"):
        main([*words, "--output_dir", str(parts), "--max_steps", "9", "--frame_stride", "3"])


def test_pairs_are_frames_of_one_video():
    tracks = CropSlotsTracks(torch.zeros(9, 2, 2), torch.ones(9, 2, dtype=torch.bool), torch.zeros(9, 2).long())
    frames = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    data = FollowedFrames(frames, np.array([1, 1, 1, 2, 2, 2, 2, 2, 3]), tracks)
    np.random.seed(0)
    pairs = [(data[i]["pixel_values"][:, 0, 0, 0] * 255).round().long().tolist() for i in range(9) for _ in range(60)]
    assert {tuple(pair) for pair in pairs} == {
        (i, j) for group in (range(3), range(3, 8), range(8, 9)) for i in group for j in group
    }


def test_objects_are_followed_in_all_frames_although_some_are_kept(videos):
    config = CropSlotsConfig(num_slots=3, image_size=SIZE, view_size=(6, 6), object_radius=0.6)
    model = CropSlotsModel(config)
    clips = [np.load(path)["frames"] for path in sorted((videos / "train").glob("*.npz"))]
    model.set_background(median_background(np.concatenate(clips)))

    class Clip:
        def __init__(self, frames):
            self.data = frames

        def frames(self):
            return self.data

    clips[1] = clips[1][:7]  # another length
    data = follow_videos(model, [Clip(clip) for clip in clips], 5, progress=False)
    assert len(data) == 4 * 3 + 2 and data.videos.tolist() == [1] * 3 + [2] * 2 + [3] * 3 + [4] * 3 + [5] * 3
    whole = model.follow(torch.from_numpy(clips[4]).permute(0, 3, 1, 2)[None].float() / 255)
    torch.testing.assert_close(data.tracks.centers[-3:], whole.centers[0, ::5], rtol=0, atol=1e-6)


def test_missing_data_and_videos_without_objects_say_so(tmp_path):
    with pytest.raises(ValueError, match="dataset is missing"):
        main([*TINY, "--output_dir", str(tmp_path / "out")])
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for k in range(2):
        np.savez(tmp_path / "empty" / "train" / f"v{k}.npz", frames=np.full((5, SIZE, SIZE, 3), 90, np.uint8))
    words = ["--dataset", str(tmp_path / "empty"), "--validation_split", "none", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="no object was found"):
        main([*TINY, *words])
