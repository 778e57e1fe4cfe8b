"""Numbers, lists of names and paths in messages."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

SHOWN_NAMES = 4
_SHOWN_CLASSES = 12


def counted(number: float, noun: str) -> str:
    """`1 row`, `2 rows`, `1,200 tokens`: a number with its noun, which takes an s but for 1.

    Numbers that are not whole are written to two places, small ones to two figures: `0.67 epochs`, `0.0012 epochs`.
    """
    if isinstance(number, int):
        written = f"{number:,}"
    else:
        written = f"{number:.2g}" if abs(number) < 0.1 else f"{number:,.2f}".rstrip("0").rstrip(".")
    return f"{written} {noun}{'' if written == '1' else 's'}"


def in_sequences(tokens: int, sequences: int) -> str:
    """` (2 sequences padded to 160)`, behind the tokens of a row: `data.max_length` bounds each. Empty for one."""
    return f" ({sequences} sequences padded to {tokens // sequences:,})" if sequences > 1 else ""


def alternatives(names: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def agreed(number: float, one: str, many: str) -> str:
    """The form of a verb that goes with a number: `is` of 1 row, `are` of 2."""
    return one if number == 1 else many


def quantised_as(quantization: str) -> str:
    """`nf4`; of none that there is none."""
    return "not quantised" if quantization == "none" else quantization


def first_line(error: BaseException) -> str:
    """The first line of what a library's error says; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


def list_names(names: Iterable[str]) -> str:
    """`a, b, c, d and 12 more`: the first few names, in order."""
    ordered = sorted(names)
    more = len(ordered) - SHOWN_NAMES
    return ", ".join(ordered[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def list_classes(rows: Mapping[str, int], unit: str = "row") -> str:
    """`ham 30, spam 12`: the rows, or words, of each class; of many classes their number and the rarest."""
    if len(rows) <= _SHOWN_CLASSES:
        return ", ".join(f"{name} {count:,}" for name, count in rows.items())
    rarest = sorted(rows.items(), key=lambda item: item[1])
    named = ", ".join(f"{name} {count:,}" for name, count in rarest[:SHOWN_NAMES])
    return f"{len(rows)} classes, {rarest[0][1]:,} to {rarest[-1][1]:,} {unit}s each; the fewest: {named}"


def list_weights(weights: Mapping[str, float]) -> str:
    """`ham 0.58, spam 3.74`: what each class counts; of many classes their number and both ends."""
    if len(weights) <= _SHOWN_CLASSES:
        return ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items())
    least, most = (by(weights.items(), key=lambda item: item[1]) for by in (min, max))
    return f"{len(weights)} classes, {least[1]:.3g} ({least[0]}) to {most[1]:.3g} ({most[0]})"


def near(path: Path) -> str:
    """A path as the user would type it: relative to the current folder where that is shorter."""
    absolute = os.path.normpath(Path.cwd() / path)
    return min(os.path.relpath(absolute), absolute, key=len)
