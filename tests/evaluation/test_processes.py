"""Evaluation in two processes gives what one gives."""

import json

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState

from cjepa_hf import bundled_checkpoint
from cjepa_hf.evaluation.processes import evaluate_push_t_in_processes

SMALL = {"planners": ["cem:6x1:2", "cem:4x1:2/window=1"], "seeds": [3, 1, 2], "num_tasks": 1, "progress": False}


def _evaluate(path: str) -> None:
    torch.set_num_threads(1)
    results = evaluate_push_t_in_processes(str(bundled_checkpoint("push_t")), controls=True, **SMALL)
    if results is not None:
        with open(path, "w") as file:
            json.dump(results, file)


def without_times(results):
    rows = [{k: v for k, v in row.items() if k != "seconds_per_plan"} for row in results["rows"]]
    pooled = {name: dict(value) for name, value in results["pooled"].items()}
    return rows, pooled, results["protocol"], results["model"]


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # the ranks are forked: let them start afresh
    debug_launcher(_evaluate, args=(str(tmp_path / "two.json"),), num_processes=2)
    two = json.loads((tmp_path / "two.json").read_text())
    _evaluate(str(tmp_path / "one.json"))
    one = json.loads((tmp_path / "one.json").read_text())
    assert two.pop("num_processes") == 2
    assert without_times(two) == without_times(one)
    assert [row["seed"] for row in one["rows"]] == [3, 1, 2, 3, 1, 2, 0, 0, 0]


def test_more_processes_than_seeds_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="4 processes share 3 seeds"):
        evaluate_push_t_in_processes("model", **SMALL)
