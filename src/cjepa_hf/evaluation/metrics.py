"""Metrics as plain functions on numpy arrays."""

import math

import numpy as np

from ..data.segments import adjusted_rand_index, foreground_ari

__all__ = [
    "adjusted_rand_index",
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
