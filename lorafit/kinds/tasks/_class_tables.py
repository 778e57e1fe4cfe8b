"""Tables of an evaluation of classes, from the scores of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorafit.contracts import ReportTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

_Rows = Sequence[Mapping[str, tuple[float, ...]]]
_Line = tuple[str | int | float, ...]
_MATRIX_CLASSES = 12
_BAR_CHARACTERS = 20


def by_class(labels: Sequence[str], rows: _Rows, thresholds: Sequence[float] = ()) -> ReportTable:
    """Precision, recall and F1 of each class; of several labels a row, above which probability each was given."""
    wanted, given = _flags(rows, "classes"), _flags(rows, "predicted")
    counts = zip(labels, wanted.sum(0), given.sum(0), (wanted * given).sum(0), strict=True)
    lines: list[_Line] = [
        (name, int(there), share(right, said), share(right, there), share(2 * right, said + there))
        for name, there, said, right in counts
    ]
    headings: tuple[str, ...] = ("class", "rows", "precision", "recall", "F1")
    if thresholds:
        headings = (*headings, "given above")
        lines = [(*line, float(threshold)) for line, threshold in zip(lines, thresholds, strict=True)]
    return ReportTable("classes", "each class", headings, tuple(lines))


def confusion(labels: Sequence[str], rows: _Rows) -> ReportTable:
    """Which classes are given for which: all of them, or of many classes the pairs that are."""
    import numpy as np

    counts = _flags(rows, "classes").T @ _flags(rows, "predicted")
    if len(labels) <= _MATRIX_CLASSES:
        title, headings = "confusion: rows of each class by the class given", ("row's class", *labels)
        cells: list[_Line] = [(name, *map(int, line)) for name, line in zip(labels, counts, strict=True)]
        return ReportTable("confusion", title, headings, tuple(cells))
    pairs = sorted((-int(counts[i, j]), i, j) for i, j in np.argwhere(counts) if i != j)
    named = tuple((labels[i], labels[j], -count) for count, i, j in pairs)
    title = "confusion: classes given for others"
    return ReportTable("confusion", title, ("row's class", "class given", "rows"), named)


def reliability(rows: _Rows) -> ReportTable:
    """How often the class given is right, by how likely the model says it is: the same share is what is wanted."""
    by_tenth: dict[int, list[tuple[float, bool]]] = {}
    for row in rows:
        (confidence,) = row["confidence"]
        by_tenth.setdefault(min(9, int(10 * confidence)), []).append((confidence, row["predicted"] == row["classes"]))
    lines: list[_Line] = []
    for tenth, found in sorted(by_tenth.items()):
        said, right = (sum(column) / len(found) for column in zip(*found, strict=True))
        bar = "█" * round(_BAR_CHARACTERS * right)
        lines.append((f"{10 * tenth} to {10 * tenth + 10} %", len(found), float(said), float(right), bar))
    title = "reliability: how often the class given is right, by its probability"
    return ReportTable("reliability", title, ("probability", "rows", "mean", "right", ""), tuple(lines))


def share(part: float, of: float) -> float | str:
    """A share; - where there is nothing that it could be of, as with a class that no row has."""
    return float(part / of) if of else "-"


def _flags(rows: _Rows, name: str) -> NDArray[Any]:
    """0 or 1 for each class of each row, [rows, classes]."""
    import numpy as np

    return np.array([row[name] for row in rows], dtype=int)
