"""The `evaluate` modules load from their folders and give what the functions give."""

import sys

import evaluate
import numpy as np
import pytest

from cjepa_hf.evaluation import metrics
from cjepa_hf.evaluation.modules import metric_folder


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """`evaluate.load` with caches of its own (it copies modules there before it imports them) and without a network."""
    cache = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(cache / "modules"))
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        patch.setattr(sys, "path", [*sys.path])
        yield lambda name: evaluate.load(str(metric_folder(name)), cache_dir=str(cache))


def test_success_rate_is_that_of_the_function(load):
    metric = load("success_rate")
    solved, other = [True, True, False, True, False], [True, False, False, False, False]
    result = metric.compute(predictions=solved)
    assert result == metrics.success_rate(solved) and result["rate"] == 0.6
    result = metric.compute(predictions=solved, baseline=other)
    assert result["difference"] == metrics.paired_difference(solved, other)
    assert result["difference"]["difference"] == pytest.approx(0.4)


def test_success_rate_adds_up_over_batches(load):
    metric = load("success_rate")
    for batch in ([True, False], [True, True, True]):
        metric.add_batch(predictions=batch)
    assert metric.compute()["successes"] == 4


def test_foreground_ari_is_that_of_the_function(load):
    random = np.random.default_rng(0)
    true = random.integers(0, 4, (3, 8, 8))
    predicted = np.where(random.random(true.shape) < 0.7, true, random.integers(0, 4, true.shape))
    metric = load("foreground_ari")
    score = metric.compute(predictions=predicted, references=true)["foreground_ari"]
    assert score == metrics.foreground_ari(true, predicted) and 0.1 < score < 0.9
    other = metric.compute(predictions=predicted, references=true, background=3)["foreground_ari"]
    assert other == metrics.foreground_ari(true, predicted, background=3) != score
    assert metric.compute(predictions=(true + 1) % 4, references=true)["foreground_ari"] == 1


def test_an_unknown_metric_is_refused():
    for name in ("accuracy", "..", "success_rate/..", ""):
        with pytest.raises(ValueError, match="success_rate"):
            metric_folder(name)
