"""Contacts read from paths: what the readout must tell apart, in scenes of two and three objects."""

from types import SimpleNamespace

import numpy as np
import pytest

from cjepa_hf.data.state_slots import OBJECT_PAIRS
from cjepa_hf.evaluation.contacts import KINDS, ContactReadout, best_threshold, event_counts, pair_features

STEPS = 12


def paths_of(rng, hit: bool):
    """Object 0 flies at object 1, which rests: it stops there and passes its velocity on, or misses it by 0.75."""
    positions = np.full((STEPS, 6, 2), 9.0)
    speed, when = rng.uniform(0.05, 0.15), rng.integers(4, 8)
    heading = rng.uniform(0, 2 * np.pi)
    ahead, aside = np.array([np.cos(heading), np.sin(heading)]), np.array([-np.sin(heading), np.cos(heading)])
    time = np.arange(STEPS) - when - rng.uniform(0.2, 0.8)
    travel = speed * time[:, None] * ahead
    if hit:
        positions[:, 0] = np.minimum(time, 0)[:, None] * speed * ahead
        positions[:, 1] = 0.56 * ahead + np.maximum(time, 0)[:, None] * speed * ahead
    else:
        positions[:, 0], positions[:, 1] = travel, 0.75 * aside
    return positions, when


def scenes(count, seed):
    rng = np.random.default_rng(seed)
    hits = rng.random(count) < 0.5
    positions, when = zip(*(paths_of(rng, hit) for hit in hits))
    present = np.zeros((count, STEPS, 6), bool)
    present[:, :, :2] = True
    meets = np.full((count, 15), 99)
    meets[hits, 0] = np.array(when)[hits]
    return SimpleNamespace(positions=np.stack(positions), present=present), np.zeros((count, 6), bool), meets


@pytest.fixture(scope="module")
def readout():
    return ContactReadout.fit(*scenes(200, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_hits_are_told_from_misses_on_new_scenes(readout, kind):
    paths, cubes, meets = scenes(100, 1)
    scores = readout.pairs(paths, cubes, kind, None)
    hit = meets[:, 0] < STEPS
    assert scores[hit, 0].min() > scores[~hit, 0].max()
    assert np.isneginf(scores[:, 1:]).all()  # nobody else is there


def test_contacts_before_the_start_do_not_count(readout):
    paths, cubes, meets = scenes(50, 2)
    rows = np.flatnonzero(meets[:, 0] < STEPS)
    part = SimpleNamespace(positions=paths.positions[rows], present=paths.present[rows])
    first = meets[rows, 0]  # the interval between steps `first` and `first + 1`
    seen = readout.pairs(part, cubes[rows], "kink", first + 1)
    late = readout.pairs(part, cubes[rows], "kink", first + 3)
    assert (seen[:, 0] > late[:, 0] + 1).all()


def test_a_push_by_a_third_object_is_not_a_contact_of_the_pair():
    positions = np.zeros((1, 4, 6, 2))
    positions[0, :, 1] = 0.7, 0.0
    positions[0, :, 0, 1] = [0.0, 0.0, 0.1, 0.2]  # object 0 is pushed sideways
    positions[0, :, 2:] = 9.0
    present = np.ones((1, 4, 6), bool)
    features, near = pair_features(SimpleNamespace(positions=positions, present=present), np.zeros((1, 6), bool))
    assert near[0, 1, 0] and near.shape == (1, 3, 15)
    apart = features["kink"][0, 1, 0, 6]
    assert abs(apart) < 0.2  # across the line between the two


def test_absent_objects_touch_nothing(readout):
    paths, cubes, _ = scenes(5, 3)
    paths.present[:, :, 1] = False
    assert np.isneginf(readout.pairs(paths, cubes, "distance", None)).all()


def test_the_threshold_is_the_best_one_and_counts_add_up(readout):
    paths, cubes, meets = scenes(100, 4)
    asked = np.zeros((100, 15), bool)
    asked[:, 0] = True
    happens = meets < STEPS
    kind, threshold = best_threshold(readout, paths, cubes, happens, asked, np.zeros(100, int))
    verdict = readout.pairs(paths, cubes, kind, None) > threshold
    counts = event_counts(verdict, happens, asked)
    assert counts.sum(0).tolist() == [int(happens.sum()), 0, 0]
    assert event_counts(~verdict, happens, asked).sum(0).tolist() == [
        0,
        int((~happens[:, 0]).sum()),
        int(happens.sum()),
    ]


def test_scenes_without_contacts_are_refused():
    paths, cubes, meets = scenes(5, 5)
    with pytest.raises(ValueError, match="no pair of objects touches"):
        ContactReadout.fit(paths, cubes, np.full_like(meets, 99))
    assert OBJECT_PAIRS[0] == (0, 1)
