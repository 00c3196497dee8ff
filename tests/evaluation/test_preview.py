"""Pictures of masks: what is drawn, and the numbers where the true masks are known."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, DatasetDict, Features, Value
from PIL import Image

from cjepa_hf.cli import _print_preview
from cjepa_hf.data.video import open_videos
from cjepa_hf.evaluation.preview import PALETTE, mask_metrics, overlay, slot_of_pixel, write_previews


class Painter(torch.nn.Module):
    """Its masks are the true ones of [`clips`]: slot 0 is dark, slot 1 red, slot 2 blue."""

    memoryless = True

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values):
        red, blue = pixel_values[:, :, 0], pixel_values[:, :, 2]
        masks = torch.stack([0.5 * torch.ones_like(red), red, blue], dim=2)[..., ::2, ::2]
        return SimpleNamespace(slots=masks.mean((-1, -2))[..., None], masks=masks)


def clips(folder, count=2, length=12):
    for number in range(count):
        frames, true = np.zeros((length, 32, 48, 3), np.uint8), np.zeros((length, 32, 48), int)
        for t in range(length):
            frames[t, 4:12, 2 * t : 2 * t + 8, 0] = 255
            true[t, 4:12, 2 * t : 2 * t + 8] = 1
            frames[t, 16:28, 30:42, 2] = 255
            true[t, 16:28, 30:42] = 2
        np.save(folder / f"clip {number}.npy", frames)
        if number == 0:
            np.save(folder / f"clip {number}.segments.npy", true)


def test_pictures_and_numbers_are_written(tmp_path):
    clips(tmp_path)
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    result = write_previews(tmp_path, Painter(), tmp_path / "out", num_videos=3, num_frames=10)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "clip_0.gif", "clip_0.png", "clip_1.gif", "clip_1.png", "metrics.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result
    assert [video["name"] for video in result["videos"]] == ["clip 0", "clip 1"]
    assert result["skipped"][0]["episode_id"] == "broken"
    assert result["foreground_ari"] == 1 and result["switches_per_100_frames"] == 0
    with Image.open(tmp_path / "out" / "clip_0.gif") as gif:
        assert gif.n_frames == 10 and gif.size == (3 * 48 * 4, 32 * 4)
        colors = []
        for t in (0, 9):
            gif.seek(t)
            colors.append(np.asarray(gif.convert("RGB"))[20 * 4, (48 + 35) * 4])
    np.testing.assert_array_equal(*colors)  # the same slot, the same color
    with Image.open(tmp_path / "out" / "clip_1.png") as picture:
        assert picture.size == (8 * 48 * 4, 2 * 32 * 4)


def test_more_objects_than_slots_are_noted(tmp_path, caplog, capsys):
    clips(tmp_path)
    true = np.load(tmp_path / "clip 0.segments.npy")
    true[3, :2, :4] = np.arange(3, 7)  # objects 1 to 6 in one frame, 7 in another
    true[5, 0, 0] = 7
    np.save(tmp_path / "clip 0.segments.npy", true)
    first, second = write_previews(tmp_path, Painter(), tmp_path / "out")["videos"]
    assert first["note"].startswith("6 objects in one frame, and the encoder has 3 slots") and "note" not in second
    assert f"clip 0: {first['note']}" in caplog.text
    assert first == json.loads((tmp_path / "out" / "metrics.json").read_text())["videos"][0]
    _print_preview(json.loads((tmp_path / "out" / "metrics.json").read_text()), tmp_path / "out")
    assert f"  clip 0: {first['note']}\n" in capsys.readouterr().out
    true[3, :2, :4] = 0
    np.save(tmp_path / "clip 0.segments.npy", true)
    assert not any("note" in row for row in write_previews(tmp_path, Painter(), tmp_path / "out")["videos"])


def test_scenes_are_drawn_as_large_as_the_encoder_takes_them_or_as_asked(tmp_path):
    state = np.array([[100, 100, 300, 300, 0, 0, 0]] * 2, np.float32)
    features = Features({"episode_id": Value("string"), "state": Array2D((None, 7), "float32")})
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"episode_id": ["e"], "state": [state]}, features=features).to_parquet(
        tmp_path / "data" / "train-00000-of-00001.parquet"
    )
    (tmp_path / "collection.json").write_text('{"simulator": "push_t"}')
    model = Painter()
    model.config = SimpleNamespace(image_size=96)
    write_previews(tmp_path, model, tmp_path / "out")
    with Image.open(tmp_path / "out" / "e.png") as picture:
        assert picture.size == (2 * 2 * 96, 3 * 2 * 96)  # two frames, twice the size; frames, masks, true masks
    model.config = None
    write_previews(tmp_path, model, tmp_path / "other", render_resolution=128)
    with Image.open(tmp_path / "other" / "e.png") as picture:
        assert picture.size == (2 * 128, 3 * 128)


def test_every_slot_has_a_color_of_its_own():
    labels = np.arange(6).reshape(1, 1, 6)
    drawn = overlay(np.full((1, 1, 6, 3), 100, np.uint8), labels)
    np.testing.assert_allclose(drawn[0, 0], 40 + 0.6 * PALETTE[:6], atol=1)
    assert len(np.unique(PALETTE, axis=0)) == len(PALETTE)


def test_masks_are_enlarged_to_the_frames():
    masks = np.zeros((20, 2, 2, 2), np.float32)
    masks[:, 0, :, 0], masks[:, 1, :, 1] = 1, 1
    labels = slot_of_pixel(masks, (6, 8))
    assert labels.shape == (20, 6, 8) and (labels[..., :3] == 0).all() and (labels[..., 5:] == 1).all()


def test_an_exchange_of_two_slots_counts_for_both_objects():
    true = np.zeros((10, 4, 8), int)
    true[:, :2, :2], true[:, 2:, 5:] = 1, 2
    labels = true.copy()
    assert mask_metrics(true, labels) == {"foreground_ari": 1.0, "switches_per_100_frames": 0.0}
    labels[5:] = np.array([0, 2, 1])[true[5:]]
    assert mask_metrics(true, labels) == {"foreground_ari": 1.0, "switches_per_100_frames": 20.0}
    assert mask_metrics(true, np.zeros_like(true))["foreground_ari"] == 0
    assert mask_metrics(np.zeros_like(true), labels)["foreground_ari"] is None
    with pytest.raises(ValueError, match="not of the same shape"):
        mask_metrics(true, labels[:5])


def test_an_encoder_without_masks_is_refused(tmp_path):
    clips(tmp_path)
    model = Painter()
    model.forward = lambda pixel_values: SimpleNamespace(slots=pixel_values[..., 0])
    with pytest.raises(ValueError, match="returns no masks"):
        write_previews(tmp_path, model, tmp_path / "out")


def test_true_masks_of_push_t_follow_its_state(tmp_path):
    state = np.array([[100, 100, 300, 300, 0, 0, 0], [120, 100, 300, 300, 0, 0, 0]], np.float32)
    features = Features({"episode_id": Value("string"), "state": Array2D((None, 7), "float32")})
    (tmp_path / "data").mkdir()
    data = Dataset.from_dict({"episode_id": ["e"], "state": [state]}, features=features)
    DatasetDict(train=data)["train"].to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    (tmp_path / "collection.json").write_text('{"simulator": "push_t"}')
    (video,) = open_videos(tmp_path, render_resolution=128)
    true = video.segments()
    assert true.shape == (2, 128, 128) and set(np.unique(true)) == {0, 1, 2, 3}
    for frame, x in zip(true, (100, 120)):
        rows, columns = np.nonzero(frame == 1)
        np.testing.assert_allclose([columns.mean() * 4, rows.mean() * 4], [x, 100], atol=4)
    assert (true[0] == 3).sum() == (true[1] == 3).sum() > 200
