"""The page on cost: FLOPs against the closed form, and the page against the command that prints it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_counted_flops_are_those_of_the_matrix_products(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scale

    size, layers, mlp = 32, 2, 64
    options = {"num_slots": 3, "slot_size": size, "num_hidden_layers": layers, "num_attention_heads": 4,
               "intermediate_size": mlp, "history_length": 2, "prediction_length": 1}  # fmt: skip
    counted = scale.count_training(options)
    tokens = 3 * 3
    layer = 2 * (4 * size * size + 2 * size * mlp) * tokens + 4 * tokens**2 * size
    forward = layers * layer + 2 * size * size * tokens
    assert counted["tokens"] == tokens
    # the anchors' projection is left to the tolerance, and the first layer needs no gradient of its input
    assert counted["training_flops_per_window"] == pytest.approx(3 * forward, rel=0.05)
    assert counted["state_bytes"] == 16 * counted["parameters"]
    weights = 4 * counted["parameters"]
    assert 0 < counted["activation_bytes_per_window"] < 60 * tokens * layers * 4 * (4 * size + 2 * mlp) + weights
    imagined = {**options, "action_size": 2}
    assert scale.count_rollout(imagined, 8, 3) == pytest.approx(2 * scale.count_rollout(imagined, 4, 3))


@pytest.mark.slow
def test_the_page_is_what_the_command_prints(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/scale.py"), "--output", str(tmp_path / "scale.md"), "--json"]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (tmp_path / "scale.md").read_text() == (ROOT / "docs/scale.md").read_text()
    # the step that benchmarks/training.py times counts as 129 GFLOP there
    assert 256 * result["sizes"]["Push-T, paper"]["training_flops_per_window"] == pytest.approx(129e9, rel=0.05)
