"""Accuracy of a classification: the share of rows whose classes are exactly those of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lorafit.kinds.metrics import RowScore, ScoreMean, metrics


@metrics.register("accuracy")
class Accuracy(ScoreMean):
    """A row counts where every class is right, also where it may have several."""

    reads: tuple[str, ...] = ("predicted", "classes", "weight")
    condition = "a row with a label"
    better: Literal["lower", "higher"] = "higher"
    percent = True

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """1 or 0, and 1."""
        return [[float(row.sums["predicted"] == row.sums["classes"]), 1.0] for row in rows]

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The share."""
        return {"accuracy": sums[0] / sums[1]}

    def signature(self) -> str:
        """What is compared."""
        return "rows whose classes are all right"
