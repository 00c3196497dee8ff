"""Metrics against closed forms and hand-counted cases."""

import numpy as np
import pytest
from scipy.stats import binomtest

from cjepa_hf.evaluation.metrics import (
    auroc,
    average_precision,
    identity_switches,
    paired_difference,
    success_rate,
    wilson_interval,
)


@pytest.mark.parametrize("successes, total", [(8, 10), (0, 20), (20, 20), (186, 200)])
def test_wilson_interval_equals_scipys(successes, total):
    expected = binomtest(successes, total).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(wilson_interval(successes, total), (expected.low, expected.high), atol=1e-12)
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)


def test_success_rate_counts_and_refuses_nothing_at_all():
    result = success_rate([True, False, True, True])
    assert (result["rate"], result["successes"], result["n"]) == (0.75, 3, 4)
    assert result["low"] < 0.75 < result["high"]
    with pytest.raises(ValueError, match="total"):
        success_rate([])


def test_paired_difference_uses_only_the_tasks_that_differ():
    first = np.array([1, 1, 1, 1, 0, 0, 1, 1], bool)
    second = np.array([1, 0, 0, 1, 0, 1, 0, 0], bool)
    result = paired_difference(first, second)
    assert (result["only_first"], result["only_second"], result["difference"]) == (4, 1, 3 / 8)
    assert result["p_value"] == pytest.approx(2 * (1 + 5) / 32)
    with pytest.raises(ValueError, match="same tasks"):
        paired_difference(first, second[:3])


def test_identity_switches_skip_frames_in_which_an_object_is_hidden():
    slots = np.array([[1, 2], [1, -1], [1, 2], [3, 2], [1, 0]])
    assert identity_switches(slots) == 3


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 40) / 5, rng.random(40) < 0.3  # many ties
    cluster, weights = rng.integers(0, 7, 40), rng.integers(0, 3, (4, 7)).astype(float)
    order = np.sign(scores[:, None] - scores[None]) / 2 + 0.5
    for row, found in zip(weights[:, cluster], auroc(scores, labels, cluster, weights), strict=True):
        pairs = np.outer(row * labels, row * ~labels)
        assert found == pytest.approx((pairs * order).sum() / pairs.sum())
    assert auroc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])) == pytest.approx(0.75)
    assert np.isnan(auroc(scores, np.zeros(40, bool)))


def test_average_precision_is_the_precision_at_each_recall():
    # by hand: thresholds 0.8 (precision 1), 0.35 (2/3) reach half and all of the positives
    found = average_precision(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    assert found == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 60) / 5, rng.random(60) < 0.4
    cluster, weights = rng.integers(0, 9, 60), rng.integers(0, 3, (3, 9))
    for counts, found in zip(weights[:, cluster], average_precision(scores, labels, cluster, weights), strict=True):
        expected, recall = 0.0, 0.0
        for threshold in np.unique(scores)[::-1]:
            taken = counts * (scores >= threshold)
            now = (taken * labels).sum() / (counts * labels).sum()
            expected += (now - recall) * ((taken * labels).sum() / taken.sum() if taken.sum() else 0)
            recall = now
        assert found == pytest.approx(expected)
        repeated = np.repeat(np.arange(60), counts)
        assert average_precision(scores[repeated], labels[repeated]) == pytest.approx(expected)
    # a score that knows nothing: the share of positives
    assert average_precision(np.zeros(10), np.arange(10) < 3) == pytest.approx(0.3)


@pytest.mark.parametrize("metric", [auroc, average_precision])
def test_scores_without_a_value_are_refused(metric):
    with pytest.raises(ValueError, match="NaN"):
        metric(np.array([0.1, np.nan]), np.array([True, False]))
    with pytest.raises(ValueError, match=r"expected \[n\]"):
        metric(np.zeros(3), np.zeros(2, bool))
    with pytest.raises(ValueError, match="clusters 0 to 3"):
        metric(np.zeros(2), np.zeros(2, bool), np.array([0, 3]), np.ones((1, 3)))
