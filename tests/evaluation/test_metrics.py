"""Metrics against closed forms and hand-counted cases."""

import numpy as np
import pytest
from scipy.stats import binomtest

from cjepa_hf.evaluation.metrics import (
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
