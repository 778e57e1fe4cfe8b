"""From which probability on a class is given, where a row may have several: chosen for the best F1 on held-out rows.

Source: Lipton, Elkan and Naryanaswamy 2014, Thresholding Classifiers to Maximize F1 Score
(https://arxiv.org/abs/1402.1892).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEFAULT_THRESHOLD = 0.5


def choose_thresholds(shares: NDArray[np.float64], right: NDArray[np.float64], *, each: bool) -> list[float]:
    """A threshold for each class.

    Args:
        shares: Probabilities [rows, classes].
        right: 0/1 for each class of each row, [rows, classes].
        each: Whether each class has its own, with its best F1; else all have one, with the best F1 over all.
    """
    classes = shares.shape[1]
    if not each:
        return [_best(shares.reshape(-1), right.reshape(-1))] * classes
    return [_best(shares[:, place], right[:, place]) for place in range(classes)]


def _best(shares: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Halfway between two probabilities, where F1 is best above it; of several the nearest to the default."""
    import numpy as np

    if not right.any():
        return DEFAULT_THRESHOLD
    values, place = np.unique(shares, return_inverse=True)
    there = np.bincount(place, weights=right, minlength=len(values))
    said = np.bincount(place, minlength=len(values))
    hits, given = (np.cumsum(counts[::-1])[::-1] for counts in (there, said))  # from each value upwards
    below = np.concatenate(([0.0], values[:-1]))
    middles = (below + values) / 2
    scores = 2 * hits / (given + right.sum())
    usable = (middles > below) & (middles < values)
    if not usable.any():
        return DEFAULT_THRESHOLD
    best = np.flatnonzero(usable & (scores >= scores[usable].max()))
    inside = best[np.argmin(np.abs(middles[best] - DEFAULT_THRESHOLD))]
    low, high = float(below[inside]), float(values[inside])
    return DEFAULT_THRESHOLD if low < DEFAULT_THRESHOLD < high else float(middles[inside])
