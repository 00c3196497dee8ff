"""docs/your_own_data.md runs as it stands, on a dozen short episodes and with fewer steps."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from cjepa_hf.cli import main
from cjepa_hf.data import load_slot_dataset
from cjepa_hf.simulators.push_t import PROPRIO_INDICES, PushTWorld, random_states
from cjepa_hf.simulators.rendering import render_push_t

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "your_own_data.md"
SMALLER = {
    "--max_steps 4000": "--max_steps 3 --num_eval_frames 20",
    "--max_steps 400\n": "--max_steps 2 --eval_samples 2 --use_cpu\n",
    "--output-dir runs/mine/savi_slots": "--output-dir runs/mine/savi_slots --num-frames 45",
    "--max_steps 10000": "--max_steps 3",
}


def write_episodes(root, count=12, length=45):
    """Folders as the page shows them: every second one has the row of actions that was never taken, as zeros."""
    world, random = PushTWorld(), np.random.default_rng(0)
    for number, state in enumerate(random_states(count, random)):
        world.set_state(state)
        actions = np.repeat(random.uniform(-0.4, 0.4, (length // 5, 2)), 5, axis=0)[: length - 1]
        states = np.stack([state, *(world.step(action) for action in actions)])
        folder = root / f"{number:03d}"
        folder.mkdir(parents=True)
        for t, frame in enumerate(render_push_t(states)):
            Image.fromarray(frame).save(folder / f"{t:04d}.png")
        np.save(folder / "actions.npy", np.concatenate([actions, np.zeros((number % 2, 2))]))
        np.save(folder / "proprio.npy", states[:, PROPRIO_INDICES])
        np.save(folder / "state.npy", states)


def run_command(line):
    """`cjepa-hf` in this process (a new one spends seconds on imports), anything else in a shell's place."""
    program, *words = shlex.split(line.replace("\\\n", " "))
    if program == "cjepa-hf":
        assert main(words) == 0, line
    else:
        assert program == "accelerate"
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words]
        result = subprocess.run(launch, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Runs every block of the page, in order, in a folder of its own; returns the folder and the names that they define."""
    root = tmp_path_factory.mktemp("your_own_data")
    page = PAGE.read_text(encoding="utf-8")
    for text, smaller in SMALLER.items():
        assert page.count(text) == 1, f"{text!r} is not in the page once: adapt SMALLER"
        page = page.replace(text, smaller)
    names = {"__name__": "your_own_data"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        patch.setenv("HF_DATASETS_CACHE", str(root / "cache"))
        (root / "examples").symlink_to(REPOSITORY / "examples")
        write_episodes(root / "my_episodes")
        for name, number in (("start", "0000"), ("goal", "0040")):
            (root / f"{name}.png").write_bytes((root / "my_episodes" / "000" / f"{number}.png").read_bytes())
        for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE):
            if language == "python":
                exec(compile(block, str(PAGE), "exec"), names)
            else:
                assert language == "bash"
                run_command(block)
    return root, names


def test_episodes_become_splits_with_nan_after_the_last_frame(result):
    root, _ = result
    data = datasets.load_dataset(str(root / "runs/mine/episodes"), cache_dir=str(root / "cache")).with_format("numpy")
    assert {split: len(rows) for split, rows in data.items()} == {"train": 11, "validation": 1}
    for number in (0, 1):
        row, source = data["train"][number], root / "my_episodes" / f"{number:03d}"
        assert np.isnan(row["actions"][-1]).all()
        np.testing.assert_allclose(row["actions"][:-1], np.load(source / "actions.npy")[:44], atol=1e-6)
        np.testing.assert_allclose(row["state"], np.load(source / "state.npy"), atol=1e-3)
        with Image.open(source / "0007.png") as frame:
            np.testing.assert_array_equal(row["frames"][7], np.asarray(frame))


def test_every_frame_has_slots(result):
    root, _ = result
    slots = load_slot_dataset(root / "runs/mine/slots", "train", cache_dir=str(root / "cache"))
    assert slots.lengths.tolist() == [45] * 11 and slots.num_slots == 4 and slots.frame_skip == 5
    assert set(slots.columns) == {"slots", "actions", "proprio", "state"} and slots.metadata["skipped"] == []
    other = load_slot_dataset(root / "runs/mine/other_slots", "validation", cache_dir=str(root / "cache"))
    assert (other.num_slots, other.slot_size, other.episode_id(0)) == (16, 3, "011")
    savi = load_slot_dataset(root / "runs/mine/savi_slots", "train", cache_dir=str(root / "cache"))
    assert (savi.num_slots, savi.slot_size, savi.lengths.tolist()) == (4, 64, [45])
    with Image.open(root / "runs/mine/masks.png") as picture:
        assert picture.size == (6 * 64, 5 * 64)  # seen, drawn, four masks; frames 0, 10, ..., 40


def test_the_numbers_that_the_page_names_are_there(result):
    root, _ = result
    numbers = json.loads((root / "runs/mine/world_model/training_results.json").read_text())["validation"]
    page, card = PAGE.read_text(encoding="utf-8"), (root / "runs/mine/world_model/README.md").read_text()
    for name in ("mse_1", "mse_5", "copy_mse_1", "copy_mse_5", "mse_1_history", "mse_5_history"):
        assert numbers[name] > 0 and f"`{name}`" in page and f"| {name} |" in card
    assert "mse_5" in (root / "runs/mine/world_model/log.jsonl").read_text()


def test_images_give_plans_in_the_units_of_the_data(result):
    _, names = result
    plan = names["plan"]
    assert plan["actions"].shape == (25, 2) and np.abs(plan["actions"]).max() <= 1
    np.testing.assert_array_equal(plan["proprio"], np.float32([256, 400, 0, 0]))
    assert names["policy"].num_plans[0] == -(-(names["step"] + 1) // 5)  # one plan per block of five actions
    assert np.isfinite(names["info"]["position_error"])
