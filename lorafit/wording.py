"""Numbers and lists of names in messages."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: float, noun: str) -> str:
    """`1 row`, `2 rows`, `1,200 tokens`: a number with its noun, which takes an s but for 1.

    Numbers that are not whole are written as short as they can be: `0.667 epochs`.
    """
    written = f"{number:,}" if isinstance(number, int) else f"{number:,.6g}"
    return f"{written} {noun}{'' if number == 1 else 's'}"


def alternatives(names: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
