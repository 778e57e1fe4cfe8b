"""Macro F1: the mean over classes of the harmonic mean of precision and recall, each class as heavy as any other.

Source: Van Rijsbergen, Information Retrieval (1979), chapter 7; the mean over classes as in scikit-learn's
`f1_score(average="macro", zero_division=0)`, over classes that occur in rows or predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lorafit.kinds.metrics import RowScore, ScoreMean, metrics


@metrics.register("macro_f1")
class MacroF1(ScoreMean):
    """F1 = 2 TP / (2 TP + FP + FN) of each class, and their mean."""

    reads: tuple[str, ...] = ("predicted", "classes", "weight")
    condition = "a row with a label"
    better: Literal["lower", "higher"] = "higher"
    percent = True

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """Of each class: whether it is right, whether it is predicted, whether it is the row's."""
        return [
            [value for p, c in zip(row.sums["predicted"], row.sums["classes"], strict=True) for value in (p * c, p, c)]
            for row in rows
        ]

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The mean; 0 for a class that is never right."""
        scores = [
            2 * right / (given + wanted)
            for right, given, wanted in zip(*[iter(sums)] * 3, strict=True)
            if given + wanted
        ]
        return {"macro_f1": sum(scores) / len(scores) if scores else 0.0}

    def signature(self) -> str:
        """Which classes are averaged."""
        return "mean F1 over classes that occur, 0 for one that is never right"
