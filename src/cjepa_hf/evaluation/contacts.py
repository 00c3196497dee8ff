"""Which pairs of objects touch, read from their paths by a logistic regression that learns from videos as they are.

Axes as in `counterfactual.py`: R rows, J steps, 6 objects, 15 pairs; interval j lies between steps j and j + 1.
"""

from typing import Protocol

import numpy as np

from ..data.state_slots import OBJECT_PAIRS

NEAR = 1.3  # world units; pairs that stay further apart in an interval do not touch in it
KINDS = ("distance", "kink")
_PAIR = np.array(OBJECT_PAIRS)
_KINK = 0.03  # world units per step: larger changes of velocity are alike


class PathsLike(Protocol):
    positions: np.ndarray  # float [R, J, 6, 2]
    present: np.ndarray  # bool [R, J, 6]


class ContactReadout:
    """
    Logistic regressions on how near a pair comes in an interval ("distance": for paths that go through each other, too),
    and on that with the sudden changes of both velocities ("kink").
    """

    def __init__(self, weights: dict[str, np.ndarray]):
        self.weights = weights

    @classmethod
    def fit(cls, paths: PathsLike, cubes: np.ndarray, meets: np.ndarray, ridge: float = 1e-3) -> "ContactReadout":
        """
        Args:
            paths: of videos as they are.
            cubes: bool [R, 6].
            meets: int [R, 15], the interval in which a pair touches first; beyond the last one: never.

        Raises `ValueError` where no pair touches.
        """
        features, near = pair_features(paths, cubes)
        interval = np.arange(near.shape[1])[None, :, None]
        label = interval == meets[:, None]
        # the intervals beside a contact look much like it, and what follows it may be a second one
        used = near & (label | (interval < meets[:, None] - 1) | (interval > meets[:, None] + 2))
        if not label[used].any():
            raise ValueError("no pair of objects touches in these videos: give more of them")
        weights = {kind: _logistic(features[kind][used], label[used].astype(float), ridge) for kind in KINDS}
        return cls(weights)

    def pairs(self, paths: PathsLike, cubes: np.ndarray, kind: str, start: np.ndarray | None) -> np.ndarray:
        """
        Scores float [R, 15] (logits): the highest of all intervals, from `start - 1` on if given (int [R], the first
        step that was not observed); -inf for pairs that never come near.
        """
        features, near = pair_features(paths, cubes)
        scores = np.where(near, features[kind] @ self.weights[kind][:-1] + self.weights[kind][-1], -np.inf)
        interval = np.arange(near.shape[1])[None, :, None]
        asked = interval < near.shape[1] - 1  # the last one only shows how the paths go on
        if start is not None:
            asked = asked & (interval >= start[:, None, None] - 1)
        return np.where(asked, scores, -np.inf).max(axis=1)


def pair_features(paths: PathsLike, cubes: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Features by kind float [R, J - 1, 15, ...], and bool [R, J - 1, 15]: both are there, and near."""
    a, b = _PAIR.T
    there = paths.present[:, :, a] & paths.present[:, :, b]  # [R, J, 15]
    move = np.diff(paths.positions, axis=1)  # [R, J - 1, 6, 2]
    known = paths.present[:, 1:] & paths.present[:, :-1]
    # velocity before and after an interval; where it is not known, that of the interval itself
    before, after = move.copy(), move.copy()
    before[:, 1:] = np.where(known[:, :-1, :, None], move[:, :-1], move[:, 1:])
    after[:, :-1] = np.where(known[:, 1:, :, None], move[:, 1:], move[:, :-1])
    relative = paths.positions[:, :, a] - paths.positions[:, :, b]
    r0, r1 = relative[:, :-1], relative[:, 1:]

    def nearest(origin, velocity):
        speed = (velocity**2).sum(-1)
        time = np.clip(-(origin * velocity).sum(-1) / np.maximum(speed, 1e-12), 0.0, 1.0)
        place = origin + time[..., None] * velocity
        return place, np.linalg.norm(place, axis=-1)

    middle, distance = nearest(r0, r1 - r0)
    normal = middle / np.maximum(distance, 1e-6)[..., None]
    change = after - before
    change_a, change_b = change[:, :, a], change[:, :, b]
    _, coming = nearest(r0, before[:, :, a] - before[:, :, b])
    _, going = nearest(r1, -(after[:, :, a] - after[:, :, b]))
    apart = np.tanh(((change_a - change_b) * normal).sum(-1) / _KINK)
    together = np.tanh(np.abs(((change_a + change_b) * normal).sum(-1)) / _KINK)  # a third object pushes
    count = (cubes[:, a].astype(float) + cubes[:, b])[:, None] + np.zeros_like(distance)
    near = there[:, :-1] & there[:, 1:] & (distance < NEAR)
    basic = [distance, distance**2, count, count * distance]
    rich = [*basic, coming, going, apart, together, apart * distance, apart * together]
    return {kind: np.stack(part, axis=-1) for kind, part in zip(KINDS, (basic, rich))}, near


def _logistic(x: np.ndarray, y: np.ndarray, ridge: float, steps: int = 50) -> np.ndarray:
    """Weights [F + 1] (the last one is the bias) of a penalised logistic regression, by Newton's method."""
    mean, scale = x.mean(0), x.std(0) + 1e-9
    z = np.concatenate([(x - mean) / scale, np.ones((len(x), 1))], axis=1)
    weight, penalty = np.zeros(z.shape[1]), ridge * len(z) * np.append(np.ones(x.shape[1]), 0.0)
    # contacts are rare: the two classes count alike
    share = np.where(y > 0, 0.5 / max(y.mean(), 1e-9), 0.5 / max(1 - y.mean(), 1e-9))
    for _ in range(steps):
        chance = 1 / (1 + np.exp(-np.clip(z @ weight, -30, 30)))
        gradient = z.T @ (share * (chance - y)) + penalty * weight
        curvature = (z * (share * chance * (1 - chance))[:, None]).T @ z + np.diag(penalty + 1e-6)
        update = np.linalg.solve(curvature, gradient)
        weight -= update * min(1.0, 5.0 / max(np.abs(update).max(), 1e-12))
        if np.abs(update).max() < 1e-6:
            break
    return np.append(weight[:-1] / scale, weight[-1] - (weight[:-1] * mean / scale).sum())


def event_counts(verdict: np.ndarray, meets: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Pairs [R, 3] that were found, imagined without reason, and missed; all arguments bool [R, 15]."""
    return np.stack(
        [(asked & verdict & meets).sum(1), (asked & verdict & ~meets).sum(1), (asked & ~verdict & meets).sum(1)],
        axis=1,
    )


def best_threshold(
    readout: ContactReadout,
    paths: PathsLike,
    cubes: np.ndarray,
    meets: np.ndarray,
    asked: np.ndarray,
    start: np.ndarray,
) -> tuple[str, float]:
    """The kind of readout and the threshold on its score with the highest F1 (the middle of the best ones)."""
    best = (-1.0, KINDS[0], 0.0)
    for kind in KINDS:
        scores = readout.pairs(paths, cubes, kind, start)[asked]
        truth = meets[asked]
        finite = scores[np.isfinite(scores)]
        if not len(finite):
            continue
        candidates = np.unique(np.quantile(finite, np.linspace(0, 1, 200)))
        candidates = (candidates[1:] + candidates[:-1]) / 2 if len(candidates) > 1 else candidates
        verdict = scores[None] > candidates[:, None]
        hit = (verdict & truth).sum(1)
        f1 = 2 * hit / np.maximum(verdict.sum(1) + truth.sum(), 1)
        top = np.flatnonzero(f1 == f1.max())
        if f1.max() > best[0]:
            best = (float(f1.max()), kind, float(candidates[top[len(top) // 2]]))
    return best[1], best[2]
