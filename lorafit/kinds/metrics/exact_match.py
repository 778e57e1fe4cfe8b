"""Share of answers that equal the reference once outer blanks are cut and inner blanks collapsed. Case counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lorafit.kinds.metrics import RowScore, metrics


def normalize(text: str) -> str:
    """`text` with every stretch of white space, line ends included, as one blank, and none outside."""
    return " ".join(text.split())


@metrics.register("exact_match")
class ExactMatch:
    """Answer equal to reference, white space apart."""

    needs: Literal["scores", "answers", "calls"] = "answers"
    reads: tuple[str, ...] = ()
    better: Literal["lower", "higher"] = "higher"
    during_training = False
    percent = True
    condition = "a row with a reference answer"
    companions: tuple[str, ...] = ()

    def usable(self, row: RowScore) -> bool:
        """Rows that hold a reference and got an answer."""
        return row.answer is not None and bool(row.reference.strip())

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """1 or 0, and 1."""
        return [[float(normalize(row.answer or "") == normalize(row.reference)), 1.0] for row in rows]

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The share."""
        return {"exact_match": sums[0] / sums[1]}

    def signature(self) -> str:
        """What is normalised."""
        return "white space collapsed, case kept"
