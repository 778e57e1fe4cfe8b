"""Share of answers that hold every string that the row names in `must_contain`.

Compared after Unicode NFKC, case folding and collapsing of white space, so that `45 EUR` is found in `45\u00a0eur`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from lorafit.kinds.metrics import RowScore, ShareOfRows, metrics


def fold(text: str) -> str:
    """`text` without what must not decide: case, kinds of blanks, compatibility forms."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def holds_all(answer: str, strings: Sequence[str]) -> bool:
    """Whether every string occurs somewhere in the answer, as a plain substring."""
    folded = fold(answer)
    return all(fold(string) in folded for string in strings)


@metrics.register("must_contain")
class MustContain(ShareOfRows):
    """All strings of the row occur in the answer."""

    name = "must_contain"
    condition = "a row that names must_contain"
    settings = "all strings, NFKC and case folded, white space collapsed"

    def usable(self, row: RowScore) -> bool:
        """Rows that name strings and got an answer."""
        return row.answer is not None and bool(row.must_contain)

    def holds(self, row: RowScore) -> bool:
        """Every string is in the answer."""
        return holds_all(row.answer or "", row.must_contain)
