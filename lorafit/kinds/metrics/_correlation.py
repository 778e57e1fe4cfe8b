"""Pearson's correlation from sums over rows, of several numbers a row its mean over them.

    r = (sum xy - sum x sum y / n) / sqrt((sum x^2 - (sum x)^2 / n) (sum y^2 - (sum y)^2 / n))

Both columns are centred on all rows first: that leaves r as it is, and keeps the digits that the differences need.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorafit.kinds.metrics import RowScore, ScoreMean

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SUMS = 6
_ROUNDING = 1e-12


class Correlation(ScoreMean):
    """How far predicted numbers go with the right ones, from -1 to 1; 0 where one of them is always the same."""

    reads = ("predicted_numbers", "right_numbers", "weight")
    better = "higher"
    condition = "a row with a number"

    @abstractmethod
    def scale(self, column: NDArray[np.float64]) -> NDArray[np.float64]:
        """What is correlated, of one number of all rows."""

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """Of each number: 1, x, y, x^2, y^2 and xy."""
        import numpy as np

        columns: list[NDArray[np.float64]] = []
        sides = (np.array([row.sums[name] for row in rows]).T for name in self.reads[:2])
        for predicted, right in zip(*sides, strict=True):
            x, y = (scaled - scaled.mean() for scaled in (self.scale(predicted), self.scale(right)))
            columns += [np.ones(len(rows)), x, y, x * x, y * y, x * y]
        sums: list[list[float]] = np.stack(columns, axis=-1).tolist()
        return sums

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The mean of r over the numbers of a row."""
        found = [_correlate(*part) for part in zip(*[iter(sums)] * _SUMS, strict=True)]
        return {self.name: sum(found) / len(found)}


def _correlate(n: float, x: float, y: float, xx: float, yy: float, xy: float) -> float:
    of_x, of_y = xx - x * x / n, yy - y * y / n
    if of_x <= _ROUNDING * xx or of_y <= _ROUNDING * yy:
        return 0.0
    return max(-1.0, min(1.0, (xy - x * y / n) / math.sqrt(of_x * of_y)))
