"""Micro F1: the harmonic mean of precision and recall over all decisions, each row's classes counted together.

Source: as `macro_f1`; the sum over classes before the quotient, as in scikit-learn's `f1_score(average="micro")`.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.kinds.metrics import RowScore, ScoreMean, metrics


@metrics.register("micro_f1")
class MicroF1(ScoreMean):
    """F1 = 2 TP / (2 TP + FP + FN) over all classes of all rows; the accuracy, where a row has one class."""

    name = "micro_f1"
    reads: tuple[str, ...] = ("predicted", "classes", "weight")
    condition = "a row with a label"
    better = "higher"
    percent = True
    settings = "F1 over the decisions of all classes; 1 where no class is there and none given"

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """Twice the classes that are right, and those that are given or the row's."""
        pairs = [(row.sums["predicted"], row.sums["classes"]) for row in rows]
        return [[2 * sum(p * c for p, c in zip(*pair, strict=True)), sum(map(sum, pair))] for pair in pairs]

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The quotient."""
        return {self.name: sums[0] / sums[1] if sums[1] else 1.0}
