"""Squared error of predicted numbers: its mean over rows and over numbers of a row, and the root of that."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorafit.kinds.metrics import ScoreMean, metrics


@metrics.register("mse")
class SquaredError(ScoreMean):
    """The mean is in the square of the numbers' unit, `rmse` in the unit itself."""

    reads = ("squared_error", "weight")
    condition = "a row with a number"
    settings = "mean over rows, and over the numbers of a row; rmse: its root"

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """Mean and root."""
        return {"mse": sums[0] / sums[1], "rmse": math.sqrt(sums[0] / sums[1])}
