"""A tensor of the files cut into stretches of rows that come from one place and get one update, or none.

rows of one tensor   |──────────── q ────────────|──── k ────|──── v ────|    three layers of the class
rebuilt as quantised |───────────────────────────|───────────|───────────|
updated              |───────────────────────────|           |───────────|
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lorafit.model.merge.merge_targets import Patch
from lorafit.model.names import Part


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows of one tensor.

    Attributes:
        start: First row.
        stop: One behind the last.
        layer: Path of the quantised layer whose values the rows are; None for the file's own.
        first: The row of that layer's weight that lies at `start`; of the tensor itself where there is none.
        patch: What is added, cut to these rows.
    """

    start: int
    stop: int
    layer: str | None
    first: int
    patch: Patch | None


_Piece = tuple[int, int, str, int]
"""Rows `start` to `stop` of a tensor, the quantised layer they belong to, and its row at `start`."""


def cut_tensors(
    rows: Mapping[str, int], quantised: Mapping[str, Sequence[Part]], patches: Mapping[str, Sequence[Patch]]
) -> dict[str, list[Stretch]]:
    """The stretches of every tensor, in the order of its rows.

    Args:
        rows: Of every tensor in the files.
        quantised: Where the weights of the quantised layers lie, by path.
        patches: What is added to which tensor.
    """
    pieces: dict[str, list[_Piece]] = {}
    for path, parts in quantised.items():
        first = 0
        for part in parts:
            pieces.setdefault(part.name, []).append((part.start, part.stop, path, first))
            first += part.stop - part.start
    return {name: _cut(count, pieces.get(name, ()), patches.get(name, ())) for name, count in rows.items()}


def _cut(rows: int, pieces: Iterable[_Piece], patches: Iterable[Patch]) -> list[Stretch]:
    edges = {0, rows}
    starts: dict[int, _Piece] = {}
    updates: dict[int, Patch] = {}
    for piece in pieces:
        starts[piece[0]] = piece
        edges |= {piece[0], piece[1]}
    for update in patches:
        updates[update.start] = update
        edges |= {update.start, update.stop}
    ordered = sorted(edges)
    found: list[Stretch] = []
    piece_now: _Piece | None = None
    patch_now: Patch | None = None
    for start, stop in pairwise(ordered):
        piece_now, patch_now = starts.get(start, piece_now), updates.get(start, patch_now)
        layer: str | None = None
        patch: Patch | None = None
        first = start
        if piece_now is not None and start < piece_now[1]:
            layer, first = piece_now[2], piece_now[3] + start - piece_now[0]
        if patch_now is not None and start < patch_now.stop:
            patch = replace(patch_now, start=start, stop=stop, first=patch_now.first + start - patch_now.start)
        found.append(Stretch(start, stop, layer, first, patch))
    return found
