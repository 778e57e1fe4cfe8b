"""Expected calibration error: how far the probability that a model gives its answers is from how often they are right.

    rows by the probability of the class given, in 15 bins of equal width
    ECE = sum over bins of |sum of probabilities - rows that are right| / rows

Source: Guo et al. 2017, On Calibration of Modern Neural Networks (https://arxiv.org/abs/1706.04599), equation 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorafit.kinds.metrics import RowScore, ScoreMean, metrics

BINS = 15


@metrics.register("calibration_error")
class CalibrationError(ScoreMean):
    """0 where 80 % of the answers given with a probability of 0.8 are right, and so everywhere."""

    reads = ("confidence", "predicted", "classes", "weight")
    condition = "a row with one label"
    percent = True
    settings = f"{BINS} bins of equal width, of the class given"

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """Rows, and of each bin probabilities less rows that are right."""
        sums = []
        for row in rows:
            confidence = row.value("confidence")
            place, is_right = bin_of(confidence), row.sums["predicted"] == row.sums["classes"]
            sums.append([1.0, *(confidence - is_right if number == place else 0.0 for number in range(BINS))])
        return sums

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The weighted mean of the bins' gaps."""
        return {"calibration_error": sum(map(abs, sums[1:])) / sums[0]}


def bin_of(confidence: float) -> int:
    """Number of a probability's bin, which holds its upper end."""
    return min(BINS - 1, max(0, math.ceil(confidence * BINS) - 1))
