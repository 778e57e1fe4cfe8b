"""The known name that a misspelt one was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names in `known` that look most like `name`, best first; empty where nothing looks alike."""
    by_folded = {k.lower().replace("-", "_"): k for k in known}
    folded = name.lower().replace("-", "_")
    found = difflib.get_close_matches(folded, list(by_folded), n=len(by_folded) or 1, cutoff=0.6)
    return [by_folded[one] for one in found if _looks_like(folded, one)][:count]


def did_you_mean(name: str, known: Iterable[str], count: int = 1) -> str:
    """`did you mean lora? `, to begin an advice with; empty where nothing looks alike."""
    close = nearest(name, known, count)
    return f"did you mean {' or '.join(close)}? " if close else ""


def _looks_like(one: str, other: str) -> bool:
    """One holds the other, or few letters differ for their length.

    Shared letters alone say little of short words: `bias` and `base` have three of four. Whole words that both have at
    one end say nothing of the rest: `nope_proj` is as far from `gate_proj` as `nope` from `gate`.
    """
    shorter = min(len(one), len(other))
    if shorter > 2 and (one in other or other in one):
        return True
    words, others = one.split("_"), other.split("_")
    for end in (0, -1):
        while len(words) > 1 and len(others) > 1 and words[end] == others[end]:
            del words[end], others[end]
    left, right = "_".join(words), "_".join(others)
    return _edits(left, right) <= max(1, min(len(left), len(right)) // 3)


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
