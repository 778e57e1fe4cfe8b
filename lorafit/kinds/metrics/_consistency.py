"""What metrics share that ask a row in other words and compare the answers with the row's own."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

from lorafit.contracts import ReportTable
from lorafit.kinds.metrics import Metric, RowScore
from lorafit.kinds.metrics._reading import LIKENESS, likeness, same_answer, shorten

_EXAMPLES = 5


class _Pair(NamedTuple):
    """An answer to other words beside the row's own."""

    likeness: float
    is_same: bool
    way: str
    words: str
    own: str
    answer: str


class Consistency(Metric):
    """Mean likeness of the answers to other words with the row's own answer, and the share that says the same.

    A model that is wrong in the same way each time is consistent: read it beside a metric of what is right.

    Attributes:
        same: Name of the share's value.
    """

    percent = True
    while_training = False
    embeds = "may"
    settings = f"mean over a row's other wordings, then over rows; {LIKENESS}"
    same: str

    def texts(self, row: RowScore) -> Sequence[str]:
        """The row's answer and those to other words."""
        return [row.answer or "", *(reply.text for reply in row.further[self.name])]

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """Mean likeness, mean sameness, and 1."""
        return [[*_means(self._pairs(row)), 1.0] for row in rows]

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """Both means."""
        return {self.name: sums[0] / sums[2], self.same: sums[1] / sums[2]}

    def tables(self, base: Sequence[RowScore], tuned: Sequence[RowScore]) -> tuple[ReportTable, ...]:
        """Figures by way of rewording, and the least alike answers of the tuned model."""
        pairs = [pair for row in tuned for pair in self._pairs(row)]
        worst = sorted(pairs, key=lambda pair: (pair.likeness, pair.words))[:_EXAMPLES]
        by_way = tuple(
            (way, *self._of_way(base, way), *self._of_way(tuned, way))
            for way in dict.fromkeys(pair.way for pair in pairs)
        )
        examples = tuple(
            (pair.way, pair.likeness, shorten(pair.words), shorten(pair.own), shorten(pair.answer))
            for pair in worst
            if not pair.is_same
        )
        ways = ("asked", "base", "base, the same", "tuned", "tuned, the same")
        shown = ("asked", "likeness", "in these words", "answer to the row", "answer to these words")
        found = (
            ReportTable(self.name, f"{self.name} by way of asking", ways, by_way),
            ReportTable(f"{self.name}_examples", f"{self.name}: least alike answers, tuned model", shown, examples),
        )
        return tuple(table for table in found if table.lines)

    def _of_way(self, rows: Sequence[RowScore], way: str) -> tuple[float, float]:
        """Both means over the rows that are asked in a way, as `values` has them."""
        asked = [of_way for row in rows if (of_way := [pair for pair in self._pairs(row) if pair.way == way])]
        likenesses, shares = zip(*map(_means, asked), strict=True)
        return mean(likenesses), mean(shares)

    def _pairs(self, row: RowScore) -> list[_Pair]:
        own, found = row.answer or "", list[_Pair]()
        for reply in row.further[self.name]:
            figures = likeness(row, own, reply.text), same_answer(row, own, reply.text)
            found.append(_Pair(*figures, reply.question.name, reply.question.words or "", own, reply.text))
        return found


def _means(pairs: Sequence[_Pair]) -> tuple[float, float]:
    return mean(pair.likeness for pair in pairs), mean(float(pair.is_same) for pair in pairs)
