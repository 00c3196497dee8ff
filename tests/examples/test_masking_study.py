"""The masking study's bookkeeping: what is run, what is skipped, and a table from files alone."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "examples" / "masking_study.py"
spec = importlib.util.spec_from_file_location("masking_study", PATH)
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)


def results(error):
    def row(name, value):
        return {"name": name, "start": "B", "position_error": {"32": {"value": value}, "64": {"value": 2 * value}},
                "cell_mean": {"value": 0.9}, "third_object": None, "informative": {"rate": 0.8}}  # fmt: skip

    hidden = [{"name": "m, hidden", "position_error": {"16": {"value": 0.3}}}]
    controls = [row(name, 1.0) for name in ("copy the video", "constant velocity", "true positions")]
    return {"models": {"m": "x"}, "rows": [row("m", error), *controls], "occluded": hidden,
            "factual": [{"f1": {"value": 0.5}}]}  # fmt: skip


def test_the_must_run_cells_are_all_there_and_cheap_ones_come_first():
    names = [study.name_of(cell) for cell in study.cells()]
    assert len(names) == len(set(names)) == 7 * 3 + 2 * 2 * 3 + 2 * 2 * 3
    budgets = [study.BUDGETS[cell[1]] for cell in study.cells()]
    assert budgets == sorted(budgets)


def test_finished_cells_are_skipped_and_the_table_tells_what_is_missing(tmp_path, monkeypatch, capsys):
    ran = []

    def run_cell(cell, args):
        ran.append(study.name_of(cell))
        folder = args.output_dir / study.name_of(cell)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results(0.1 + 0.1 * cell[2])))

    monkeypatch.setattr(study, "run_cell", run_cell)
    words = ["--dataset", "x", "--output-dir", str(tmp_path), "--only", "oc_1x"]
    table = study.main(words)  # without the data that learned-oc and few-oc need
    assert ran == ["oc_1x_seed0", "oc_1x_seed1", "oc_1x_seed2"]
    study.main(words)
    assert len(ran) == 3  # nothing was run again
    (row,) = table["rows"]
    error = row["error +32"]
    assert error["mean"] == pytest.approx(0.2) and error["n"] == 3
    assert error["high"] - error["mean"] == pytest.approx(4.30 * 0.1 / 3**0.5)
    assert row["third object"] == {"mean": None, "n": 0} and row["hidden +16"]["mean"] == 0.3
    assert len(table["missing"]) == len(study.cells()) - 3 and "prefix1-p1_1x_seed0" in table["missing"]
    study.main([*words[:-1], "hide1_1x_seed0", "hide1_1x_seed2"])
    again = study.main([*words[:-1], "oc_1x"])
    (gap,) = again["differences"]  # over the seeds that both have
    assert (gap["variant"], gap["budget"]) == ("hide1 - oc", "1x")
    assert gap["error +32"]["mean"] == pytest.approx(0) and gap["error +32"]["n"] == 2
    del ran[3:]
    printed = capsys.readouterr().out
    assert "missing cells (42)" in printed and "constant velocity" in printed
    study.main([*words[:-1], "few-oc_1x_seed2", "--few-dataset", "y"])
    assert ran[3:] == ["few-oc_1x_seed2"]
    with pytest.raises(SystemExit):
        study.main([*words[:-1], "nothing-like-this"])


def test_every_kind_of_cell_is_trained_on_its_own_data():
    args = argparse.Namespace(dataset=Path("all"), learned_dataset=Path("seen"), few_dataset=Path("few"))
    found = [study.dataset_of((variant, "1x", 0), args).name for variant in ("hide1", "learned-hide1", "few-oc")]
    assert found == ["all", "seen", "few"]


def test_every_variant_is_a_training_that_its_model_accepts():
    from cjepa_hf.models.cjepa import CJepaConfig
    from cjepa_hf.training.arguments import parse_value

    recipe = {}
    for line in study.RECIPE.read_text().splitlines():
        name, _, value = line.partition("#")[0].partition(":")
        if value.strip():
            recipe[name.strip()] = value.strip().strip('"')
    for words in study.VARIANTS.values():
        given = recipe | dict(zip((w.removeprefix("--") for w in words[::2]), words[1::2]))
        fields = {k: parse_value(v) for k, v in given.items() if k in CJepaConfig.__annotations__}
        config = CJepaConfig(num_slots=6, slot_size=64, **fields)
        assert config.visible_prefix in (1, 2) and config.loss_type == "huber" and config.frame_skip == 4
