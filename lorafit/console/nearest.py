"""The known name that a misspelt one was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names in `known` that look most like `name`, best first; empty where nothing looks alike."""
    by_folded = {k.lower().replace("-", "_"): k for k in known}
    folded = name.lower().replace("-", "_")
    found = difflib.get_close_matches(folded, list(by_folded), n=len(by_folded) or 1, cutoff=0.6)
    close = []
    for one in found:
        # One holds the other, or few letters differ for their length. Shared letters alone say little of short words:
        # `bias` and `base` have three of four.
        shorter, is_part = min(len(folded), len(one)), folded in one or one in folded
        if (shorter > 2 and is_part) or _edits(folded, one) <= max(1, shorter // 3):
            close.append(by_folded[one])
    return close[:count]


def did_you_mean(name: str, known: Iterable[str], count: int = 1) -> str:
    """`did you mean lora? `, to begin an advice with; empty where nothing looks alike."""
    close = nearest(name, known, count)
    return f"did you mean {' or '.join(close)}? " if close else ""


def _edits(one: str, other: str) -> int:
    """Letters to add, take away, change or swap with their neighbour until one word is the other."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, above, row = row, before, [i]
        for j, wanted in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                cost = min(cost, above[j - 2] + 1)
            row.append(cost)
    return row[-1]
