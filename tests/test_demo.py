"""The shipped checkpoint: it plans held-out tasks from pixels, and imagines the scene without the block."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, pipeline

from cjepa_hf import CJepaConfig, CJepaModel, bundled_checkpoint
from cjepa_hf.demo import run_demo, save_gif, without_block
from cjepa_hf.simulators.push_t import random_states
from cjepa_hf.simulators.rendering import render_push_t


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_demo(bundled_checkpoint(), tmp_path_factory.mktemp("demo"), num_tasks=3, progress=False)


def test_the_shipped_model_solves_tasks_that_doing_nothing_does_not(report):
    assert report["with_proprio"]["successes"] >= 2  # 3 of 3 but for a task at the edge; chance solves 1 in 40
    assert report["no-op"]["successes"] == 0
    assert report["with_proprio"]["n"] == report["without_proprio"]["n"] == len(report["tasks"]) == 3
    json.dumps(report)


def test_current_proprioception_changes_the_plans(report):
    # not the whole summaries: the seconds in them differ anyhow
    with_proprio, without = (report[name]["median_position_error_px"] for name in ("with_proprio", "without_proprio"))
    assert abs(with_proprio - without) > 1


def test_the_counterfactual_matches_the_simulator_and_differs_from_the_fact(report):
    counterfactual = report["counterfactual"]
    assert counterfactual["agent_moves_px"] > 30
    assert counterfactual["agent_error_px_without_block"] < 0.2 * counterfactual["agent_moves_px"]
    picture = np.asarray(Image.open(report["files"]["counterfactual"]))
    rows = [picture[20 + i * 134 : 20 + i * 134 + 128, 150:] for i in range(4)]

    def slate(row):  # pixels of the block's color
        return int((np.abs(row.astype(int) - (135, 150, 170)).max(-1) < 25).sum())

    assert slate(rows[0]) > 500 and slate(rows[1]) > 500
    assert slate(rows[2]) < 50 and slate(rows[3]) < 100


def test_the_gif_shows_every_task_and_its_colors(report, tmp_path):
    gif = Image.open(report["files"]["gif"])
    assert gif.n_frames > 5 and gif.size[0] > 3 * 240
    frames = [np.full((20, 20, 3), 255, np.uint8) for _ in range(3)]
    frames[1][5:7, 5:7] = (214, 39, 40)
    save_gif(tmp_path / "small.gif", frames)
    small = Image.open(tmp_path / "small.gif")
    small.seek(1)
    assert np.abs(np.asarray(small.convert("RGB"))[5, 5].astype(int) - (214, 39, 40)).max() < 12


def test_removing_the_block_leaves_the_rest_of_the_imagination_in_place(tmp_path):
    """The agent is kinematic: with actions that stay away from the block, both imaginations agree on it."""
    folder = bundled_checkpoint()
    model, processor = CJepaModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    actions = model.normalize_actions(torch.tensor([[0.0, -0.1] * 5] * 5))
    state = np.array([100.0, 350.0, 380.0, 250.0, 1.0, 0.0, 0.0])
    result = without_block(model, processor, state, actions, tmp_path / "away.png")
    assert result["block_moves_px"] < 1e-6
    assert result["agent_error_px_with_block"] < 8 and result["agent_error_px_without_block"] < 8


def test_the_checkpoint_is_small_self_contained_and_loads_by_the_auto_classes():
    folder = bundled_checkpoint()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    model = AutoModel.from_pretrained(folder)
    assert isinstance(model, CJepaModel) and model.slot_encoder is not None
    frames = render_push_t(np.array([[100.0, 350.0, 380.0, 250.0, 1.0]]), resolution=224)
    slots = model.encode(AutoImageProcessor.from_pretrained(folder)(list(frames))["pixel_values"].unsqueeze(1))
    agent = model.slot_encoder.positions(slots)[0, 0, 1]
    assert (agent - torch.tensor([100.0, 350.0])).norm() < 8
    with pytest.raises(ValueError, match="push_t"):
        bundled_checkpoint("cube")


def test_a_model_without_the_encoder_that_the_demo_needs_is_refused(tmp_path):
    size = dict(slot_size=16, num_attention_heads=4, num_hidden_layers=1, intermediate_size=16, action_size=10)
    CJepaModel(CJepaConfig(**size)).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds no slot encoder; the demo needs a ColorIsaModel"):
        run_demo(tmp_path / "model", tmp_path / "demo", num_tasks=1, progress=False)
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("style", ["smooth", "aliased"])
def test_frames_with_red_and_blue_swapped_are_refused_and_no_others(style):
    planner = pipeline("goal-planning", model=str(bundled_checkpoint()))
    states = random_states(20, np.random.default_rng(0))
    frames = render_push_t(states, resolution=96, style=style)
    for frame in frames:
        planner.preprocess({"start": frame, "goal": frame})
        with pytest.raises(ValueError, match="start seems to be BGR"):
            planner.preprocess({"start": frame[..., ::-1], "goal": frame})
