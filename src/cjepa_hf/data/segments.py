"""How segmentations of frames, true or found, compare: plain functions on numpy arrays."""

import numpy as np

__all__ = ["adjusted_rand_index", "foreground_ari"]


def adjusted_rand_index(true: np.ndarray, predicted: np.ndarray) -> float:
    """
    Adjusted Rand index of two labellings int [P] of the same P pixels: 1 for equal partitions whatever the labels, 0 in
    expectation for random ones. Two partitions into a single part each are equal: 1.
    """
    true, predicted = np.asarray(true).ravel(), np.asarray(predicted).ravel()
    if true.shape != predicted.shape or not len(true):
        raise ValueError(
            f"labellings of {len(true)} and {len(predicted)} pixels: expected the same number, at least 1."
        )
    _, true = np.unique(true, return_inverse=True)
    _, predicted = np.unique(predicted, return_inverse=True)
    table = np.zeros((true.max() + 1, predicted.max() + 1))
    np.add.at(table, (true, predicted), 1)

    def pairs(counts):
        return (counts * (counts - 1) / 2).sum()

    together, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    total = pairs(np.array([len(true)], dtype=float))
    expected = rows * columns / total if total else 0.0
    best = (rows + columns) / 2
    return 1.0 if best == expected else float((together - expected) / (best - expected))


def foreground_ari(true: np.ndarray, predicted: np.ndarray, background: int = 0) -> float:
    """Mean over frames of the adjusted Rand index on the pixels that are not background; int [F, H, W] (or [H, W])."""
    true, predicted = (x[None] if x.ndim == 2 else x for x in (np.asarray(true), np.asarray(predicted)))
    if true.shape != predicted.shape:
        raise ValueError(f"segments {true.shape} and masks {predicted.shape} must have the same shape.")
    scores = [
        adjusted_rand_index(t[t != background], p[t != background])
        for t, p in zip(true, predicted)
        if (t != background).any()
    ]
    if not scores:
        raise ValueError(f"no frame has a foreground pixel (label other than {background}).")
    return float(np.mean(scores))
