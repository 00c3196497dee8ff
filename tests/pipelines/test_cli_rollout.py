"""`cjepa-hf rollout` and `cjepa-hf answer` on tiny models and slots."""

import json

import numpy as np
import pytest
import torch

from cjepa_hf import AloeConfig, AloeForVideoQuestionAnswering, AloeProcessor, CJepaConfig, CJepaModel
from cjepa_hf.cli import main
from cjepa_hf.slot_probe import SlotProbe

N, D, T = 3, 16, 20


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with `world` (and its probe), `aloe` and slots.npy: a red cube, a blue cube and nothing."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    small = dict(num_slots=N, slot_size=D, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32)
    CJepaModel(CJepaConfig(**small, history_length=3, frame_skip=2)).save_pretrained(folder / "world")
    AloeForVideoQuestionAnswering(AloeConfig(**small, num_frames=5, hidden_size=16)).save_pretrained(folder / "aloe")
    AloeProcessor(num_frames=5, observed_frames=T, min_imagined_frames=4).save_pretrained(folder / "aloe")
    slots = 0.1 * torch.randn(T, N, D) + 2 * torch.eye(N, D)
    slots[:, 2] = 0
    present = torch.tensor([True, True, False]).expand(T, -1).flatten()
    color = torch.tensor([0, 1, 0]).expand(T, -1).flatten()
    SlotProbe.fit(
        slots.flatten(0, 1), present=present, positions=slots[..., 4:6].flatten(0, 1),
        labels={"color": color, "shape": torch.zeros_like(color)},
        attributes={"color": ("red", "blue"), "shape": ("cube", "sphere")},
    ).save_pretrained(folder / "world")  # fmt: skip
    np.save(folder / "slots.npy", slots.numpy())
    return folder


def test_rollout_prints_who_is_affected_and_writes_files(root, tmp_path, capsys):
    words = ["rollout", root / "slots.npy", "--model", root / "world", "-i", "drop:red cube", "-i", "mask:1"]
    words += ["--num-frames", 4, "--gif", tmp_path / "a.gif", "--output", tmp_path / "a.npz", "--device", "cpu"]
    assert main([*map(str, words), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["start"] == T and report["num_frames"] == 4 and report["history"] == 3
    assert [one["intervention"] for one in report["interventions"]] == ["drop:red cube", "mask:1"]
    with np.load(tmp_path / "a.npz") as file:
        assert file["slots"].shape == (2, 4, N, D) and np.isnan(file["slots"][0, :, 0]).all()
        assert file["paths_factual"].shape == (4, N, 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.gif", "a.npz"]
    assert main([*map(str, words)]) == 0
    assert "drop:red cube: " in capsys.readouterr().out
    assert main(["rollout", str(root / "slots.npy"), "--model", str(root / "world"), "-i", "empty:2"]) == 2
    assert "slot 2 of scene 0 is empty" in capsys.readouterr().err


def test_answer_prints_options_and_what_was_imagined(root, capsys):
    words = [
        "answer",
        root / "slots.npy",
        "What will happen without the red cube?",
        "The cube and the blue cube collide",
    ]
    words += ["--model", root / "aloe", "--world-model", root / "world", "--device", "cpu"]
    assert main([*map(str, words), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["removed"] == {"slot": 0, "object": "red cube", "branch": 6} and len(result["options"]) == 1
    assert main([*map(str, words)]) == 0
    printed = capsys.readouterr().out
    assert "without red cube in slot 0" in printed and "note: option" in printed
    words[2:4] = ["How many collisions happen?"]
    assert main([*map(str, words)]) == 0
    assert "0 of 5 frames were imagined" in capsys.readouterr().out
    words[2] = "What will happen without the red cube?"
    assert main([*map(str, words)]) == 2
    assert "give its options" in capsys.readouterr().err
