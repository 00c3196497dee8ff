"""Metrics as plain functions on numpy arrays."""

import math

import numpy as np

from ..data.segments import adjusted_rand_index, foreground_ari

__all__ = [
    "adjusted_rand_index",
    "auroc",
    "average_precision",
    "foreground_ari",
    "identity_switches",
    "paired_difference",
    "success_rate",
    "wilson_interval",
]


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    Wilson score interval of a rate: unlike the normal approximation it stays inside [0, 1] and is honest near 0 and 1.

    Args:
        successes, total: counts, 0 <= successes <= total, total > 0.
        confidence: of the two-sided interval.
    """
    if not (total > 0 and 0 <= successes <= total):
        raise ValueError(f"successes={successes}, total={total}: expected 0 <= successes <= total and total > 0.")
    z = _normal_quantile(0.5 + confidence / 2)
    rate, spread = successes / total, z * z / total
    center = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(rate * (1 - rate) * spread + spread * spread / 4) / (1 + spread)
    return max(center - half, 0.0), min(center + half, 1.0)


def _normal_quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


def success_rate(successes) -> dict[str, float | int]:
    """Rate of bool [n] with its 95 % Wilson interval: {"rate", "low", "high", "successes", "n"}."""
    successes = np.asarray(successes, dtype=bool).ravel()
    count = int(successes.sum())
    low, high = wilson_interval(count, len(successes))
    return {"rate": count / len(successes), "low": low, "high": high, "successes": count, "n": len(successes)}


def paired_difference(first, second) -> dict[str, float | int]:
    """
    Difference of two success rates on the same tasks, bool [n] each: mean of first - second with its 95 % interval
    (normal, from the paired differences) and the exact two-sided McNemar p-value of the tasks they disagree on.
    """
    first, second = np.asarray(first, dtype=bool).ravel(), np.asarray(second, dtype=bool).ravel()
    if first.shape != second.shape or not len(first):
        raise ValueError(f"paired results need the same tasks, got {len(first)} and {len(second)}.")
    difference = first.astype(float) - second.astype(float)
    error = difference.std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else float("nan")
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    disagreements = only_first + only_second
    tail = sum(math.comb(disagreements, k) for k in range(min(only_first, only_second) + 1)) / 2**disagreements
    return {
        "difference": float(difference.mean()),
        "low": float(difference.mean() - 1.96 * error),
        "high": float(difference.mean() + 1.96 * error),
        "only_first": only_first,
        "only_second": only_second,
        "p_value": min(1.0, 2 * tail),
        "n": len(difference),
    }


def identity_switches(slot_of_object: np.ndarray) -> int:
    """How often an object changes its slot from one frame to the next; int [T, K], -1 where it is not visible."""
    assigned = np.asarray(slot_of_object)
    switches = 0
    for column in assigned.T:
        seen = column[column >= 0]
        switches += int((np.diff(seen) != 0).sum())
    return switches


def auroc(
    scores: np.ndarray, labels: np.ndarray, cluster: np.ndarray | None = None, weights: np.ndarray | None = None
) -> np.ndarray:
    """
    Chance that a positive scores higher than a negative (area under the ROC curve), ties counted half.

    Args:
        scores: float [n], higher = more likely positive.
        labels: bool [n].
        cluster, weights: int [n] (such as the episode) and float [K, clusters]: one result per row of weights, such as
            one per bootstrap resample.

    Returns:
        float, or [K]; NaN where positives or negatives have no weight.
    """
    scores, labels, cluster, weights = _checked(scores, labels, cluster, weights)
    size = weights.shape[-1]
    positive, negative = scores[labels], scores[~labels]
    order = np.lexsort((negative, cluster[~labels]))
    ends = np.searchsorted(cluster[~labels][order], np.arange(size + 1))
    # wins[e, f]: pairs of a positive of cluster e and a negative of cluster f in the right order
    wins = np.zeros((size, size))
    for f in np.flatnonzero(np.diff(ends)):
        part = negative[order[ends[f] : ends[f + 1]]]
        below = (np.searchsorted(part, positive, "left") + np.searchsorted(part, positive, "right")) / 2
        wins[:, f] = np.bincount(cluster[labels], weights=below, minlength=size)
    totals = [weights @ np.bincount(cluster[part], minlength=size) for part in (labels, ~labels)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((weights @ wins) * weights).sum(-1) / (totals[0] * totals[1])


def average_precision(
    scores: np.ndarray, labels: np.ndarray, cluster: np.ndarray | None = None, weights: np.ndarray | None = None
) -> np.ndarray:
    """
    Precision averaged over the recall that each threshold adds, as scikit-learn defines it; a score that knows nothing
    gets the share of positives. Arguments and result as in [`auroc`]; NaN where positives have no weight.
    """
    scores, labels, cluster, weights = _checked(scores, labels, cluster, weights)
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))
    labels, cluster = labels[order], cluster[order]
    rows = np.atleast_2d(weights)
    chunk = max(2**21 // len(scores), 1)  # of resamples: a few times 16 MiB
    results = []
    for first in range(0, len(rows), chunk):
        weight = rows[first : first + chunk, cluster]
        positive = np.add.reduceat(weight * labels, starts, axis=-1)
        found, taken = np.cumsum(positive, axis=-1), np.cumsum(np.add.reduceat(weight, starts, axis=-1), axis=-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = np.where(found > 0, found / taken, 0.0)
            results.append((positive * precision).sum(-1) / positive.sum(-1))
    return np.concatenate(results).reshape(weights.shape[:-1])


def _checked(scores, labels, cluster, weights):
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    cluster = np.zeros(len(scores), dtype=int) if cluster is None else np.asarray(cluster)
    weights = np.ones(cluster.max(initial=0) + 1) if weights is None else np.asarray(weights, dtype=float)
    if scores.ndim != 1 or labels.shape != scores.shape or cluster.shape != scores.shape or not len(scores):
        raise ValueError(f"scores {scores.shape}, labels {labels.shape}, cluster {cluster.shape}: expected [n] each.")
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinite values: leave out what has no score.")
    if cluster.min() < 0 or cluster.max() >= weights.shape[-1]:
        raise ValueError(f"clusters {cluster.min()} to {cluster.max()}, but weights {weights.shape}.")
    return scores, labels, cluster, weights
