"""Suites of world models: equal terms, resumable cells, tables from files alone."""

import csv
import json
import mmap
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cjepa_hf import CJepaConfig, CJepaModel, ColorIsaConfig, ColorIsaImageProcessor, ColorIsaModel, DinoWmConfig
from cjepa_hf.cli import main as command_line
from cjepa_hf.data.collect import collect_push_t
from cjepa_hf.evaluation import comparison
from cjepa_hf.evaluation.comparison import SUITES, main, task_difference, training_options
from cjepa_hf.training.arguments import parse_value
from cjepa_hf.training.cjepa import CJepaTrainArguments

RECIPE = Path(__file__).parents[2] / "examples" / "push_t" / "world_model.yaml"
CELLS = [(suite, variant) for suite, variants in SUITES.items() for variant in variants]
EXACT = {"action_size": 10, "proprio_size": 4, "slot_size": 64}


def split_options(suite, variant, size="small"):
    """(training arguments, configuration) of a cell."""
    options = training_options(suite, variant, 0, size=size)
    config_class = CJepaConfig if options.pop("model") == "cjepa" else DinoWmConfig
    fields = {key: parse_value(str(value)) for key, value in options.items() if key in config_class.__annotations__}
    rest = {key: value for key, value in options.items() if key not in fields}
    return CJepaTrainArguments(output_dir="x", dataset="x", **rest), config_class(**EXACT, **fields)


# --- what a cell is ------------------------------------------------------------------------------------------------


def test_c_jepa_is_the_recipe_that_the_shipped_model_was_trained_with():
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe = {key: parse_value(value) if isinstance(value, str) else value for key, value in recipe.items()}
    ours = {key: parse_value(str(value)) for key, value in training_options("push-t", "c-jepa", 0).items()}
    # the window is the planner's choice here, and evaluations would count as training
    assert recipe.pop("planning_window") == 1 and comparison.planner_of("push-t", "c-jepa") == "default/window=1"
    assert recipe.pop("eval_every") != ours.pop("eval_every")
    assert ours.pop("model") == "cjepa" and ours.pop("seed") == 0 and ours == recipe


@pytest.mark.parametrize("size", ["small", "paper"])
@pytest.mark.parametrize(("suite", "variant"), CELLS)
def test_every_cell_is_a_training_and_a_suite_differs_in_the_model_alone(suite, variant, size):
    arguments, config = split_options(suite, variant, size)
    first, _ = split_options(suite, next(iter(SUITES[suite])), size)
    same = ("max_steps", "batch_size", "warmup_steps", "slot_noise", "ema_decay", "weight_decay", "mixed_precision")
    same += () if variant == "none-adamw" else ("optimizer", "learning_rate", "muon_learning_rate")
    assert all(getattr(arguments, name) == getattr(first, name) for name in same)
    layers = (4, 4, 256) if size == "small" else (6, 16, 2048)
    assert (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) == layers
    window = int(comparison.planner_of(suite, variant).rpartition("=")[2])
    assert window == config.history_length or (suite == "push-t" and window == 1)


@pytest.mark.parametrize("share", [25, 50])
def test_masks_hide_the_share_of_the_slots_that_their_name_says(share):
    slots = torch.randn(400, 3, 4, 64)
    masks = {}
    for kind in ("object", "token", "tube"):
        _, config = split_options("masking", f"{kind}-{share}%")
        masks[kind] = CJepaModel(config).draw_slot_mask(slots, torch.Generator().manual_seed(0))
        assert not masks[kind][:, 0].any()
        assert (masks[kind][:, 1:].float().mean((1, 2)) == share / 100).all()
    whole = {kind: (mask[:, 1] == mask[:, 2]).all(-1).float().mean() for kind, mask in masks.items()}
    assert whole["object"] == 1  # an object is hidden in both frames
    # of the 28 (70) ways to hide 2 (4) of 8 tokens, 4 (6) are whole objects
    assert abs(whole["token"] - {25: 4 / 28, 50: 6 / 70}[share]) < 0.06
    # a tube is a slot in both frames or two slots in one, equally likely; two of the latter are whole objects where they
    # are of different frames and, one pair of six, of the same slots
    assert abs(whole["tube"] - {25: 1 / 2, 50: 1 / 4 + 1 / 4 * 1 / 2 * 1 / 6}[share]) < 0.06


def test_ablations_change_one_thing():
    def changes(suite, variant, base):
        a, b = (training_options(suite, name, 0) for name in (variant, base))
        return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}

    assert changes("push-t", "oc-jepa", "c-jepa") == {"num_masked_slots"}
    assert changes("masking", "object-25%", "none") == {"num_masked_slots", "mask_strategy"}
    assert changes("auxiliary", "history-1", "tokens") == {"history_length"}
    assert changes("flags", "norm-first", "none") == {"norm_first"}
    assert changes("flags", "residual", "last-anchor") == {"residual_prediction"}
    assert changes("flags", "mixed-history", "none") == {"history_crop_probability"}
    assert training_options("push-t", "dino-wm-patches", 0)["token_type"] == "patches"
    assert training_options("push-t", "oc-dino-wm", 0)["token_type"] == "slots"


# --- bookkeeping ---------------------------------------------------------------------------------------------------


def fake_cell(suite, variant, seed, args, data):
    """A cell whose tasks all succeed for c-jepa, and half of them for others."""
    success = [True] * 4 if variant == "c-jepa" else [True, True, False, seed == 1]
    settings = comparison.cell_settings(suite, variant, seed, args)
    cell = {
        "suite": suite, "variant": variant, "seed": seed, **settings, "data": str(args.slots), "tokens": 4, "width": 64,
        "trained": {"steps": 9, "seconds": 60.0, "cpu_seconds": 30.0 + 60 * seed, "peak_memory_mib": 100 + seed,
                    "parameters": 7, "resumed": seed == 2, "validation": {"mse_1": 1.0, "mse_5": 0.5, "copy_mse_1": 1.0, "copy_mse_5": 2.0}},
        "evaluation": {"success": success, "seconds_per_plan": 0.5, "plans_per_task": 4.0},
        "device": "cpu", "hardware": "h", "processor": "p", "versions": {}, "commit": "c", "load_average": seed,
    }  # fmt: skip
    if args.time_plans and seed == args.seeds[0]:
        cell["paper_planner_seconds"] = [2.0, 4.0]
    path = comparison._result_file(args.output_dir, suite, variant, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(cell))


@pytest.fixture
def ran(monkeypatch):
    cells = []
    monkeypatch.setattr(
        comparison, "prepare_data", lambda args, patches: {"slots": {"described": str(args.slots)}, "patches": patches}
    )
    monkeypatch.setattr(
        comparison, "run_cell", lambda *cell: (cells.append((*cell[:3], cell[4]["patches"])), fake_cell(*cell))
    )
    return cells


def words(folder, *more):
    return ["--suite", "push-t", "--output-dir", str(folder), "--slots", "s", "--encoder", "e", *more]


def test_finished_cells_are_not_run_again_and_the_table_names_what_is_missing(tmp_path, ran, capsys):
    table = main(words(tmp_path, "--only", "c-jepa", "oc-jepa_seed0"))
    assert [cell[1:] for cell in ran] == [("oc-jepa", 0, False), *(("c-jepa", seed, False) for seed in range(3))]
    assert len(table["missing"]) == 12 - 4 and "dino-wm-patches_seed2" in table["missing"]
    assert main(words(tmp_path, "--only", "c-jepa")) == table and len(ran) == 4
    assert main(["--suite", "push-t", "--output-dir", str(tmp_path), "--table"]) == table
    other, ours = table["rows"]
    assert ours["rate"] == 1 and ours["n"] == 12 and ours["by_seed"] == [1, 1, 1] and "difference" not in ours
    assert ours["training_cpu_minutes"] == 1.0 and ours["load_average"] == 2 and ours["peak_memory_mib"] == 102
    assert other["rate"] == 0.5 and other["difference"]["difference"] == -0.5 and other["difference"]["tasks"] == 4
    assert ours["error_against_copying"] == 0.25 and ours["plan_seconds_per_task"] == 2
    assert ours["paper_seconds_per_plan"] == 3 and ours["paper_plans_timed"] == 2
    assert ours["paper_seconds_of_50_tasks_extrapolated"] == 300
    printed = capsys.readouterr().out
    assert "missing cells (8)" in printed and "3.00 (n=2)" in printed and "300s" in printed


def test_a_table_is_written_as_json_csv_and_a_picture(tmp_path, ran):
    table = main(words(tmp_path, "--only", "*jepa*", "--time-plans", "2"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["push-t", "push-t.csv", "push-t.json", "push-t.png"]
    assert json.loads((tmp_path / "push-t.json").read_text()) == table
    rows = list(csv.DictReader((tmp_path / "push-t.csv").open()))
    assert [row["variant"] for row in rows] == ["oc-jepa", "c-jepa"]
    assert float(rows[0]["difference_difference"]) == pytest.approx(table["rows"][0]["difference"]["difference"])
    picture = np.asarray(Image.open(tmp_path / "push-t.png"))
    blue, red = ((np.abs(picture.astype(int) - color).sum(-1) < 30) for color in ((31, 119, 180), (214, 39, 40)))
    assert blue.sum() > 100 and red.sum() > 100  # intervals, and bars of the planner's time
    untimed = comparison.draw(
        {"protocol": "p", "rows": [{k: v for k, v in table["rows"][0].items() if "paper" not in k}]}
    )
    assert untimed.width < picture.shape[1]


def test_cells_of_other_settings_are_not_mixed(tmp_path, ran):
    main(words(tmp_path, "--only", "c-jepa_seed0", "--max_steps", "30"))
    with pytest.raises(ValueError, match="other settings"):
        main(words(tmp_path, "--only", "c-jepa_seed0"))
    with pytest.raises(ValueError, match="num_tasks"):
        main(words(tmp_path, "--only", "c-jepa_seed0", "--max_steps", "30", "--num_tasks", "3"))
    with pytest.raises(ValueError, match="max_steps"):  # nor beside each other
        main(words(tmp_path, "--only", "c-jepa_seed1"))
    given = words(tmp_path, "--only", "c-jepa_seed1", "--max_steps", "30")
    with pytest.raises(ValueError, match=r"'data': .'s', 'other'"):
        main([*given, "--slots", "other"])
    assert len(ran) == 1 and len(main(given)["missing"]) == 10


def test_wrong_arguments_cost_no_work(tmp_path, ran):
    for wrong in (["--only", "nothing"], ["--more", "--batch_size"], ["--suite", "none"]):
        with pytest.raises(SystemExit):
            main(words(tmp_path, *wrong))
    with pytest.raises(ValueError, match="200 tasks"):
        main(words(tmp_path, "--num-tasks", "201"))
    with pytest.raises(ValueError, match="--episodes"):  # patch tokens need frames
        main(words(tmp_path))
    assert not ran


def test_the_command_line_runs_suites(tmp_path, capsys):
    assert command_line(["evaluate", "--suite", "flags", "--output-dir", str(tmp_path), "--table"]) == 0
    assert "missing cells (21)" in capsys.readouterr().out
    assert command_line(["evaluate", "--suite=flags", "--output-dir", str(tmp_path), "--only", "all"]) == 2
    assert "--encoder is needed" in capsys.readouterr().err


def test_a_difference_counts_a_task_once_however_many_seeds_tried_it():
    first = np.array([[1, 1, 1, 0], [1, 1, 1, 0]], bool)
    second = np.array([[0, 1, 1, 0], [0, 1, 1, 0]], bool)
    one, two = task_difference(first[:1], second[:1]), task_difference(first, second)
    assert two == one | {"by_seed": [0.25, 0.25]}
    assert one["difference"] == 0.25 and one["high"] - 0.25 == pytest.approx(1.96 * 0.5 / 2)
    with pytest.raises(ValueError, match="same seeds and tasks"):
        task_difference(first[:1], second)


def test_peak_memory_is_what_was_in_use():
    with comparison._Watch() as before:
        pass
    with comparison._Watch() as during:
        # not a tensor: the allocator may have kept 64 MiB from earlier tests
        block = mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.write(bytes(64 * 2**20))
        comparison.time.sleep(0.5)
        block.close()
    assert before.peak > 0 and during.peak - before.peak > 50 * 2**20


# --- from episodes to a table --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A few episodes, and a small untrained slot encoder."""
    folder = tmp_path_factory.mktemp("suite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        counts = {"train": 3, "validation": 1}
        collect_push_t(folder / "episodes", num_episodes=counts, episode_length=40, num_workers=1, progress=False)
        torch.manual_seed(0)
        encoder = ColorIsaConfig(slot_size=16, hidden_size=16, mlp_size=16, stem_channels=8)
        ColorIsaModel(encoder).save_pretrained(folder / "encoder")
        ColorIsaImageProcessor().save_pretrained(folder / "encoder")
        yield folder


TINY = "--max_steps 2 --num_tasks 1 --seeds 0 --device cpu --planner cem:4x1:2/window=1 --json"
MORE = "--more --batch_size 4 --eval_samples 2 --num_hidden_layers 1 --intermediate_size 16"


def test_a_suite_runs_from_episodes_to_its_table_and_is_then_done(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "train_apart", comparison.train_here)
    monkeypatch.setattr(comparison, "time_plans", lambda folder, name, *_: [0.5] if name == "paper" else None)
    given = f"--suite push-t --output-dir {tmp_path} --episodes {sources}/episodes --encoder {sources}/encoder {TINY}"
    table = main(f"{given} --num-frames 80 --only dino-wm-patches c-jepa {MORE}".split())
    patches, slots = table["rows"]
    assert (patches["tokens"], patches["width"], slots["tokens"], slots["width"]) == (64, 48, 4, 16)
    assert patches["difference"]["tasks"] == 1 and patches["peak_memory_mib"] > 100 and patches["training_minutes"] > 0
    cell = json.loads((tmp_path / "push-t" / "dino-wm-patches_seed0.json").read_text())
    assert cell["trained"]["steps"] == 2 and not cell["trained"]["resumed"] and cell["training"]["batch_size"] == 4
    assert cell["data"]["splits"]["train"]["num_episodes"] == 2  # those with the first 80 frames
    # a finished training whose cell was lost is not trained again
    (tmp_path / "push-t" / "c-jepa_seed0.json").unlink()
    again = main(f"{given} --num-frames 80 --only c-jepa {MORE}".split())
    assert again["rows"][1]["training_minutes"] == slots["training_minutes"]
    # slots of other episodes are not compared with
    given = given.replace(f"{tmp_path} ", f"{tmp_path / 'other'} ")
    with pytest.raises(ValueError, match="other episodes"):
        main(f"{given} --slots {tmp_path / 'slots'} --only dino-wm-patches {MORE}".split())


@pytest.mark.slow
def test_a_cell_trains_in_a_process_of_its_own_and_its_plans_are_timed(sources, tmp_path):
    given = f"--suite push-t --output-dir {tmp_path} --episodes {sources}/episodes --encoder {sources}/encoder {TINY}"
    (row,) = main(f"{given} --time-plans 2 --only c-jepa {MORE}".split())["rows"]
    assert row["paper_plans_timed"] == 2 and row["paper_seconds_per_plan"] > 0 and row["training_cpu_minutes"] > 0
