"""Segmentations against hand-counted cases."""

import numpy as np
import pytest

from cjepa_hf.data.segments import adjusted_rand_index, foreground_ari


def test_rand_index_ignores_names_and_is_zero_in_expectation_for_random_labels():
    true = np.repeat([0, 1, 2], 50)
    assert adjusted_rand_index(true, (true + 1) % 3) == 1.0
    rng = np.random.default_rng(0)
    random = [adjusted_rand_index(true, rng.integers(0, 3, 150)) for _ in range(200)]
    assert abs(np.mean(random)) < 0.01
    # Hubert and Arabie: pairs together in both 2 of 4 and 3, of 10
    assert adjusted_rand_index(np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 1])) == pytest.approx(1 / 6)


def test_foreground_ari_does_not_see_the_background():
    true = np.array([[[0, 0, 1, 1], [0, 0, 2, 2]]])
    predicted = np.array([[[5, 6, 7, 7], [8, 9, 3, 3]]])
    assert foreground_ari(true, predicted) == 1.0
    wrong = np.array([[[5, 6, 7, 3], [8, 9, 3, 7]]])
    assert foreground_ari(true, wrong) == foreground_ari(true[0], wrong[0]) == pytest.approx(-0.5)
    with pytest.raises(ValueError, match="foreground"):
        foreground_ari(np.zeros((1, 2, 2), int), np.zeros((1, 2, 2), int))
