"""Share of answers that hold every string that the row names in `must_contain`.

Compared after Unicode NFKC, case folding and collapsing of white space, so that `45 EUR` is found in `45\u00a0eur`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Literal

from lorafit.kinds.metrics import RowScore, metrics


def fold(text: str) -> str:
    """`text` without what must not decide: case, kinds of blanks, compatibility forms."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def holds_all(answer: str, strings: Sequence[str]) -> bool:
    """Whether every string occurs somewhere in the answer, as a plain substring."""
    folded = fold(answer)
    return all(fold(string) in folded for string in strings)


@metrics.register("must_contain")
class MustContain:
    """All strings of the row occur in the answer."""

    needs: Literal["scores", "answers", "calls"] = "answers"
    reads: tuple[str, ...] = ()
    better: Literal["lower", "higher"] = "higher"
    during_training = False
    percent = True
    condition = "a row that names must_contain"
    companions: tuple[str, ...] = ()

    def usable(self, row: RowScore) -> bool:
        """Rows that name strings and got an answer."""
        return row.answer is not None and bool(row.must_contain)

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """1 or 0, and 1."""
        return [[float(holds_all(row.answer or "", row.must_contain)), 1.0] for row in rows]

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The share."""
        return {"must_contain": sums[0] / sums[1]}

    def signature(self) -> str:
        """What is normalised."""
        return "all strings, NFKC and case folded, white space collapsed"
