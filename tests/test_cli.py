"""The command line: every command on tiny inputs, and every error one line with exit status 2."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from cjepa_hf import (
    CJepaConfig,
    CJepaModel,
    ColorIsaConfig,
    ColorIsaImageProcessor,
    DinoWmConfig,
    DinoWmModel,
    PushTEnv,
)
from cjepa_hf.cli import main
from cjepa_hf.data import load_slot_dataset
from cjepa_hf.simulators.push_t import random_states
from cjepa_hf.simulators.rendering import render_push_t
from cjepa_hf.training.color_isa import scene_statistics

COMMANDS = ("demo", "collect", "extract", "probe", "train", "evaluate", "plan", "convert", "card", "publish")
FAST = "--max_steps 2 --batch_size 4 --eval_every 0 --save_every 0 --use_cpu true"
SMALL = "--num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 32 --history_length 2"


def run(*words):
    """`main` of these words; a string may hold several."""
    return main([part for word in words for part in (word.split() if isinstance(word, str) else [str(word)])])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with `model` (untrained, but with slots that know the scene's colors), start.png and goal.png."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        torch.manual_seed(0)
        frames = render_push_t(random_states(40, np.random.default_rng(0)))
        encoder = ColorIsaConfig(slot_size=16, hidden_size=16, mlp_size=16, stem_channels=8)
        config = CJepaConfig(
            slot_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, action_size=10,
            proprio_size=4, slot_encoder_config=encoder,
        )  # fmt: skip
        model = CJepaModel(config)
        model.slot_encoder.set_scene(*scene_statistics(frames, 4))
        model.set_statistics(
            action_mean=torch.zeros(10), action_std=torch.full((10,), 0.1),
            proprio_mean=torch.tensor([256.0, 256.0, 0.0, 0.0]), proprio_std=torch.full((4,), 100.0),
        )  # fmt: skip
        model.save_pretrained(folder / "model")
        ColorIsaImageProcessor().save_pretrained(folder / "model")
        for name, frame in zip(("start", "goal"), frames):
            Image.fromarray(frame).save(folder / f"{name}.png")
        yield folder


@pytest.fixture(scope="module")
def episodes(root):
    words = "--episodes 4 --validation-episodes 2 --episode-length 12 --workers 1 --json"
    assert run("collect push_t --output-dir", root / "episodes", words) == 0
    return root / "episodes"


@pytest.fixture(scope="module")
def slots(root, episodes):
    words = ["--encoder", root / "model", "--output-dir", root / "slots", "--frame-skip 2 --json"]
    assert run("extract", episodes, *words) == 0
    return root / "slots"


def fails(capsys, *words):
    """Runs a command that must fail and returns what it says."""
    capsys.readouterr()
    assert run(*words) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert [line for line in lines if line.startswith(f"cjepa-hf {words[0]}: ")] == lines[-1:]
    assert "Traceback" not in captured.err and captured.out == ""
    return lines[-1]


def damaged(root, tmp_path, change):
    """A copy of the model, changed by `change(folder)`."""
    folder = tmp_path / "damaged"
    shutil.copytree(root / "model", folder)
    change(folder)
    return folder


def edit_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def truncate(size):
    def change(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return change


# --------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    try:
        status = run(command, "--help")
    except SystemExit as exit:
        status = exit.code
    text = capsys.readouterr().out
    assert status == 0 and text.startswith(f"usage: cjepa-hf {command}")


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize(
    ("model", "argument"),
    [
        ("cjepa", "--slot_encoder"),
        ("aloe", "--validation_questions"),
        ("color-isa", "--num_frames"),
        ("crop-slots", "--frame_stride"),
        ("savi", "--flip_probability"),
        ("videosaur", "--backbone"),
    ],
)
def test_training_lists_its_own_arguments(model, argument, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cjepa-hf"])
    with pytest.raises(SystemExit, match="0"):
        run("train", model, "--help")
    output = capsys.readouterr().out
    assert output.startswith(f"usage: cjepa-hf train {model} [-h]") and argument in output


def test_the_installed_command_is_this_one_and_ends_with_its_status():
    (script,) = entry_points(group="console_scripts", name="cjepa-hf")
    assert script.load() is main
    words = "collect push_t --output-dir x --episodes -1"
    command = f"import sys; from cjepa_hf.cli import main; sys.argv[1:] = {words.split()}; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("cjepa-hf collect: num_episodes['train']=-1") and result.stderr.count("\n") == 1


def test_unknown_arguments_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        run("evaluate", "--num-task", "3x", "--nonsense")
    with pytest.raises(SystemExit, match="2"):
        run("plan")


# ---------------------------------------------------------------------------------------------------------- the chain


def test_collect_prints_what_it_wrote(episodes, capsys):
    words = "--episodes 4 --validation-episodes 2 --episode-length 12 --workers 1"
    capsys.readouterr()
    assert run("collect", "push_t", "--output-dir", episodes, words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_episodes"] == {"train": 4, "validation": 2}
    assert run("collect", "push_t", "--output-dir", episodes, words) == 0
    assert capsys.readouterr().out == f"Episodes in {episodes}\n"


def test_extract_prints_what_it_wrote(root, episodes, slots, capsys):
    capsys.readouterr()
    assert (
        run("extract", episodes, "--encoder", root / "model", "--output-dir", slots, "--frame-skip", 2, "--json") == 0
    )
    assert json.loads(capsys.readouterr().out)["splits"]["train"] == {"num_episodes": 4, "num_frames": 52}
    assert load_slot_dataset(slots).num_slots == 4


def test_train_leaves_a_model_that_plans(root, slots, tmp_path, capsys):
    shutil.copytree(root / "model", tmp_path / "encoder")
    CJepaModel.from_pretrained(root / "model").slot_encoder.save_pretrained(tmp_path / "encoder")
    words = ["--dataset", slots, "--slot_encoder", tmp_path / "encoder", "--output_dir", tmp_path, FAST, SMALL]
    assert run("train", "cjepa", *words) == 0
    capsys.readouterr()
    images = (root / "start.png", root / "goal.png")
    assert run("plan", *images, "--model", tmp_path, "--proprio", 200, 300, 0, 0, "--horizon", 2, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert np.shape(plan["actions"]) == (4, 2) and plan["cost"] > 0  # 2 blocks of frame_skip 2


def test_train_a_slot_encoder_on_collected_frames(root, tmp_path, capsys):
    words = "--episodes 3 --validation-episodes 1 --episode-length 8 --frames 64 --workers 1"
    assert run("collect", "push_t", "--output-dir", tmp_path / "frames", words) == 0
    words = ["--dataset", tmp_path / "frames", "--output_dir", tmp_path / "encoder", FAST]
    assert run("train", "color-isa", *words, "--num_frames", 24, "--num_eval_frames", 8) == 0
    assert run("extract", tmp_path / "frames", "--encoder", tmp_path / "encoder", "--output-dir", tmp_path / "s") == 0
    assert "Slots in" in capsys.readouterr().out


def test_extract_draws_frames_as_large_as_asked_for_slots_and_previews(root, episodes, tmp_path, capsys):
    words = ["--encoder", root / "model", "--output-dir", tmp_path / "s", "--render-resolution", 96, "--preview", 1]
    assert run("extract", episodes, *words, "--splits", "validation", "--json") == 0
    assert json.loads(capsys.readouterr().out)["source"]["render"]["resolution"] == 96
    with Image.open(next((tmp_path / "s" / "preview").glob("*.png"))) as picture:
        assert picture.width % (2 * 96) == 0  # twice the size, so that masks can be seen
    words = ["--encoder", root / "model", "--output-dir", tmp_path / "other", "--frame-skip", 0]
    assert "frame_skip must be an integer of at least 1" in fails(capsys, "extract", episodes, *words)


def test_plan_prints_a_table_and_json_of_the_same_actions(root, capsys):
    words = ["plan", root / "start.png", root / "goal.png", "--model", root / "model", "--horizon", 1]
    words += ["--proprio", 200, 300, 0, 0]
    capsys.readouterr()
    assert run(*words) == 0
    text = capsys.readouterr().out
    assert run(*words, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    rows = [[float(value) for value in line.split()] for line in text.splitlines()[1:]]
    np.testing.assert_allclose(rows, plan["actions"], atol=5e-4)
    assert np.shape(rows) == (5, 2) and np.abs(rows).max() <= 1


def test_plan_takes_any_world_model_and_explains_one_that_sees_no_images(root, tmp_path, capsys):
    size = dict(token_type="slots", num_slots=4, slot_size=16, num_attention_heads=2, num_hidden_layers=1)
    size |= dict(intermediate_size=32, action_size=10)
    encoder = CJepaModel.from_pretrained(root / "model").slot_encoder
    for name, extra in (("seeing", {"slot_encoder_config": encoder.config}), ("blind", {})):
        model = DinoWmModel(DinoWmConfig(**size, **extra))
        model.set_statistics(action_mean=torch.zeros(10), action_std=torch.full((10,), 0.1))
        model.save_pretrained(tmp_path / name)
    ColorIsaImageProcessor().save_pretrained(tmp_path / "seeing")
    images = (root / "start.png", root / "goal.png")
    capsys.readouterr()
    assert run("plan", *images, "--model", tmp_path / "seeing", "--horizon", 1, "--json") == 0
    assert np.shape(json.loads(capsys.readouterr().out)["actions"]) == (5, 2)
    assert "holds no slot encoder" in fails(capsys, "plan", *images, "--model", tmp_path / "blind")


def test_evaluate_writes_and_prints_the_same_results(root, tmp_path, capsys):
    words = ["evaluate", "--model", root / "model", "--num-tasks", 2, "--planner", "cem:8x1:2", "--controls"]
    capsys.readouterr()
    assert run(*words, "--json", "--output", tmp_path / "new" / "results.json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "new" / "results.json").read_text())
    assert [row["name"] for row in printed["rows"]] == ["cem:8x1:2", "replay", "random", "no-op"]
    assert all(row["n"] == 2 and len(row["success"]) == 2 for row in printed["rows"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.json"]
    assert run(*words[:-1]) == 0
    assert capsys.readouterr().out.startswith("pusht-25: ")


def test_an_interrupted_evaluation_leaves_its_finished_rows(root, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("cjepa_hf.evaluation.suite.run_baseline", interrupted)
    words = ["evaluate", "--model", root / "model", "--num-tasks", 1, "--planner", "cem:8x1:2", "--controls"]
    assert run(*words, "--output", tmp_path / "results.json") == 130
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["cem:8x1:2"] and results["pooled"]["cem:8x1:2"]["n"] == 1


def test_demo_writes_its_pictures_and_reports(root, tmp_path, capsys):
    capsys.readouterr()
    assert run("demo", "--model", root / "model", "--num-tasks", 1, "--output-dir", tmp_path / "demo", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["tasks"]) == 1 and report["with_proprio"]["n"] == report["without_proprio"]["n"] == 1
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["counterfactual.png", "push_t.gif"]
    with Image.open(report["files"]["gif"]) as gif, Image.open(report["files"]["counterfactual"]) as picture:
        assert gif.n_frames > 10 and picture.size[0] > 128


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate(5000), "are cut off or damaged"),
        (truncate(-5000), "are cut off or damaged"),
        (truncate(3), "are cut off or damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
        (edit_config(num_slot=4), "Did you mean 'num_slots'"),
        (edit_config(num_slots="four"), "'num_slots' expected int"),
        (edit_config(intermediate_size=64), "not of the sizes that config.json says"),
    ],
)
def test_a_damaged_model_is_refused_and_nothing_is_written(root, tmp_path, capsys, change, message):
    folder = damaged(root, tmp_path, change)
    output = tmp_path / "results.json"
    assert message in fails(capsys, "evaluate", "--model", folder, "--num-tasks", 1, "--json", "--output", output)
    assert os.listdir(tmp_path) == ["damaged"]


@pytest.mark.parametrize("command", ["evaluate", "demo", "plan", "extract", "train"])
def test_damaged_weights_are_named_by_every_command(root, episodes, slots, tmp_path, capsys, command):
    folder = damaged(root, tmp_path, truncate(5000))
    words = {
        "evaluate": ["--model", folder],
        "demo": ["--model", folder, "--output-dir", tmp_path / "new"],
        "plan": [root / "start.png", root / "goal.png", "--model", folder],
        "extract": [episodes, "--encoder", folder, "--output-dir", tmp_path / "new"],
        "train": ["cjepa", "--dataset", slots, "--slot_encoder", folder, "--output_dir", tmp_path / "new", FAST],
    }[command]
    assert "are cut off or damaged" in fails(capsys, command, *words)
    assert not any(path.is_file() for path in (tmp_path / "new").rglob("*"))


@pytest.mark.parametrize("command", ["evaluate", "plan", "extract"])
def test_pickled_weights_are_not_read(root, episodes, tmp_path, capsys, command):
    def change(folder):
        torch.save(CJepaModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    folder = damaged(root, tmp_path, change)
    words = {
        "evaluate": ["--model", folder, "--num-tasks", 1],
        "plan": [root / "start.png", root / "goal.png", "--model", folder],
        "extract": [episodes, "--encoder", folder, "--output-dir", tmp_path / "new"],
    }[command]
    assert "model.safetensors" in fails(capsys, command, *words)


@pytest.mark.parametrize("command", ["evaluate", "demo", "plan", "extract", "train"])
def test_a_missing_folder_is_named(root, tmp_path, capsys, command):
    missing = tmp_path / "missing"
    words = {
        "evaluate": ["--model", missing],
        "demo": ["--model", missing, "--output-dir", tmp_path / "new"],
        "plan": [root / "start.png", root / "goal.png", "--model", missing],
        "extract": [missing, "--encoder", root / "model", "--output-dir", tmp_path / "new"],
        "train": ["cjepa", "--dataset", missing, "--output_dir", tmp_path / "new"],
    }[command]
    message = fails(capsys, command, *words)
    assert str(missing) in message and "not a Hub id" in message
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_missing_encoder_is_named(root, episodes, slots, tmp_path, capsys):
    missing = tmp_path / "missing"
    message = fails(capsys, "extract", episodes, "--encoder", missing, "--output-dir", tmp_path / "new")
    assert str(missing) in message and "no such folder" in message
    words = ["--dataset", slots, "--slot_encoder", missing, "--output_dir", tmp_path / "new"]
    message = fails(capsys, "train", "cjepa", *words, FAST, SMALL)
    assert str(missing) in message and "no such folder" in message


def test_a_dataset_with_missing_columns_is_refused(root, tmp_path, capsys):
    data = datasets.Dataset.from_dict({"pictures": [1, 2]})
    for split in ("train", "validation"):
        data.to_parquet(tmp_path / "bad" / "data" / f"{split}-00000-of-00001.parquet")
    new = ["--output-dir", tmp_path / "new"]
    assert "needs 'frames'" in fails(capsys, "extract", tmp_path / "bad", "--encoder", root / "model", *new)
    new = ["--output_dir", tmp_path / "new"]
    assert "has columns ['pictures']" in fails(capsys, "train", "color-isa", "--dataset", tmp_path / "bad", *new)
    assert "not a slot dataset" in fails(capsys, "train", "cjepa", "--dataset", tmp_path / "bad", *new)
    assert os.listdir(tmp_path) == ["bad"]


def test_a_truncated_dataset_file_is_refused(root, slots, tmp_path, capsys):
    shutil.copytree(slots, tmp_path / "cut")
    path = next((tmp_path / "cut" / "data").glob("train*"))
    path.write_bytes(path.read_bytes()[:2000])
    message = fails(capsys, "train", "cjepa", "--dataset", tmp_path / "cut", "--output_dir", tmp_path / "new")
    assert path.name in message and "extract the dataset again" in message
    assert os.listdir(tmp_path) == ["cut"]


def test_finished_work_is_not_overwritten(root, episodes, slots, tmp_path, capsys):
    words = "--episodes 5 --validation-episodes 2 --episode-length 12 --workers 1"
    assert "made with other arguments" in fails(capsys, "collect", "push_t", "--output-dir", episodes, words)
    words = ["--encoder", root / "model", "--output-dir", slots, "--frame-skip", 3]
    assert "choose another folder" in fails(capsys, "extract", episodes, *words)
    words = ["--encoder", root / "model", "--output-dir", episodes]
    assert "choose a new folder" in fails(capsys, "extract", episodes, *words)


@pytest.mark.parametrize("mode", ["L", "I;16", "CMYK", "LA"])
def test_an_image_without_colors_is_refused(root, tmp_path, capsys, mode):
    with Image.open(root / "start.png") as image:
        image.convert("L" if mode == "I;16" else mode).convert(mode).save(tmp_path / "image.tiff")
    message = fails(capsys, "plan", tmp_path / "image.tiff", root / "goal.png", "--model", root / "model")
    assert f"mode '{mode}'" in message and "RGB" in message


def test_an_unreadable_image_is_named(root, tmp_path, capsys):
    path = tmp_path / "image.png"
    path.write_bytes((root / "start.png").read_bytes()[:300])
    for image in (path, tmp_path / "missing.png", root / "model" / "config.json"):
        message = fails(capsys, "plan", root / "start.png", image, "--model", root / "model")
        assert str(image) in message and "give a PNG" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--protocol", "pusht-26"],
            "expected one of ['cf-rollout', 'cf-rollout-validation', 'pusht-25', 'pusht-25-validation']",
        ),
        (["--num-tasks", 0], "has 200 tasks"),
        (["--num-tasks", 1, "--planner", "best"], "expected default, sampling, paper or cem"),
        (["--device", "cuda:77"], "leave --device out"),
        (["--device", "abacus"], "leave --device out"),
        (["--output", "."], "give the name of a file"),
    ],
)
def test_wrong_values_are_explained(root, capsys, words, message):
    assert message in fails(capsys, "evaluate", "--model", root / "model", *words)


def test_proprioception_of_another_size_is_refused(root, capsys):
    words = [root / "start.png", root / "goal.png", "--model", root / "model", "--proprio", 1, 2]
    assert "proprio must be 4" in fails(capsys, "plan", *words)


def test_training_arguments_are_checked_before_anything_is_written(root, slots, tmp_path, capsys):
    words = ["train", "cjepa", "--dataset", slots, "--output_dir", tmp_path / "new"]
    assert "did you mean 'num_slots'" in fails(capsys, *words, "--num_slot", 4)
    assert "longest of" in fails(capsys, *words, "--history_length", 20)
    assert not os.listdir(tmp_path)


def test_a_goal_outside_the_table_is_refused():
    with pytest.raises(ValueError, match=r"goal_state .* outside the table"):
        PushTEnv().reset(options={"goal_state": [256, 256, 600, 256, 0, 0, 0]})


def test_an_interruption_is_no_traceback(root, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("cjepa_hf.data.collect.collect_push_t", interrupted)
    assert run("collect", "push_t", "--output-dir", root / "never") == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_fault_of_the_program_keeps_its_traceback(root, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("bug")

    monkeypatch.setattr("cjepa_hf.data.collect.collect_push_t", broken)
    with pytest.raises(KeyError, match="bug"):
        run("collect", "push_t", "--output-dir", root / "never")
