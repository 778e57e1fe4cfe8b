"""What a base's weights are before an adapter is folded into them: the files' own values, or those that training saw.

A tensor is cut into stretches of rows that come from one place and get one update, or none:

rows of one tensor   |──────────── q ────────────|──── k ────|──── v ────|    three layers of the class
rebuilt as quantised |───────────────────────────|───────────|───────────|
updated              |───────────────────────────|           |───────────|
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from lorafit.contracts import JsonMapping
from lorafit.errors import ModelError
from lorafit.files.safetensors import TensorEntry, dtype_name, torch_dtype
from lorafit.kinds.folding import Fold
from lorafit.kinds.quantizations import Rows, quantizations
from lorafit.model.base import Base
from lorafit.model.inspect import NOTED_DTYPES
from lorafit.model.merge.merge_targets import Patch, Updates, read_class_parts
from lorafit.model.merge.requantize import PlainRows, Rebuilder, noted_kind
from lorafit.model.names import Part, read_parts, require_parts, rows_of


@dataclass(frozen=True, slots=True)
class Values:
    """How the values that are written are made.

    Attributes:
        used: The run's quantization.json where the weights are those that training saw; None for the file's own.
        quantised: Where the weights of its quantised layers lie, by path.
        dtype: safetensors' name of what floats are written in; the file's where None.
        kept: Tensors that stay in the file's dtype all the same: what the class leaves out, or keeps in another.
    """

    used: JsonMapping | None = None
    quantised: Mapping[str, Sequence[Part]] = field(default_factory=dict)
    dtype: str | None = None
    kept: frozenset[str] = frozenset()


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


_Piece = tuple[int, int, str | None, int]
"""Rows `start` to `stop` of a tensor, the quantised layer they belong to, and its row at `start`."""


@dataclass(frozen=True, slots=True)
class Source:
    """A stretch with what its values are made of."""

    stretch: Stretch
    rows: Rows
    fold: Fold | None

    @classmethod
    def of(cls, stretch: Stretch, rows: Rows) -> Source:
        """With the change of its rows."""

        def read(start: int, stop: int) -> torch.Tensor:
            return rows.read(stretch.first + start, stretch.first + stop)

        return cls(stretch, rows, stretch.patch.fold(read) if stretch.patch else None)


class Sources:
    """The stretches of every tensor of a base with their values and folds.

    Args:
        entries: The base's tensors.
        updates: The adapter's.
        values: What the values are.

    Attributes:
        rebuilder: Makes quantised layers again; None where values are the files' own.
        stretches: Of each tensor, in the order of its rows.
    """

    def __init__(self, entries: Mapping[str, TensorEntry], updates: Updates, values: Values) -> None:
        self._entries, self._copies = entries, updates.copies
        self.rebuilder = Rebuilder(entries, values.used, values.quantised) if values.used is not None else None
        self.stretches = _cut_tensors(rows_of(entries), values.quantised, updates.patches)

    def of(self, tensor: str) -> list[Source]:
        """Those of one tensor, in the order of its rows."""
        return [self.open(tensor, stretch) for stretch in self.stretches[tensor]]

    def open(self, tensor: str, stretch: Stretch) -> Source:
        """One of them."""
        entry = self._entries[tensor].as_matrix()
        rows: Rows = PlainRows(entry)
        if stretch.layer is not None and self.rebuilder is not None:
            rows = self.rebuilder.rows(stretch.layer)
        elif entry.name in self._copies:
            rows = PlainRows(self._copies[entry.name].as_matrix(), torch_dtype(entry.dtype))
        return Source.of(stretch, rows)


def _cut_tensors(
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


def _cut(rows: int, pieces: Sequence[_Piece], patches: Sequence[Patch]) -> list[Stretch]:
    edges = {0, rows, *(edge for piece in pieces for edge in piece[:2])}
    edges |= {edge for patch in patches for edge in (patch.start, patch.stop)}
    found = []
    for start, stop in pairwise(sorted(edges)):
        patch = next((patch for patch in patches if patch.start <= start < patch.stop), None)
        if patch is not None:
            patch = replace(patch, start=start, stop=stop, first=patch.first + start - patch.start)
        begin, _, layer, first = next((p for p in pieces if p[0] <= start < p[1]), (0, rows, None, 0))
        found.append(Stretch(start, stop, layer, first + start - begin, patch))
    return found


def check_quantization(quantization: JsonMapping | None, base: Base) -> JsonMapping:
    """A run's quantization.json, by which its base can be made again.

    Raises:
        ModelError: There is none, or it says something else than lorafit writes.
    """
    name = str((quantization or {}).get("kind"))
    is_known = name in quantizations.names() and quantizations.get(name).is_quantized
    if not quantization or "tensors" not in quantization or not is_known:
        raise ModelError(
            "nothing is known of how training quantised this base, so it cannot be rebuilt",
            file=str(base.path),
            todo="merge a run folder, or merge with --base original",
        )
    wrong = _malformed(quantization)
    if wrong is not None:
        what, todo = "says something else than lorafit writes", "restore the file, or merge with --base original"
        raise ModelError(what, file="quantization.json", key=wrong, todo=todo)
    return quantization


def _malformed(used: JsonMapping) -> str | None:
    """The key of a quantization.json that holds what no run wrote; None where all is well."""
    if used.get("weights_dtype") not in NOTED_DTYPES:
        return "weights_dtype"
    if not isinstance(used.get("double_quant", False), bool):
        return "double_quant"
    tensors = used["tensors"]
    if not isinstance(tensors, dict):
        return "tensors"
    texts, numbers = ("codes", "constants"), (int, float, type(None))
    for name, proof in tensors.items():
        if not isinstance(proof, dict) or not all(isinstance(proof.get(key), str) for key in texts):
            return f"tensors.{name}"
        if not isinstance(proof.get("offset"), numbers):
            return f"tensors.{name}.offset"
        if noted_kind(used, proof) is None:
            return f"tensors.{name}.kind"
        try:
            _noted_parts(proof)
        except (TypeError, ValueError):
            return f"tensors.{name}.parts"
    kept = used.get("kept", [])
    return None if isinstance(kept, list) and all(isinstance(name, str) for name in kept) else "kept"


def choose_values(base: Base, used: JsonMapping | None, entries: Mapping[str, TensorEntry]) -> Values:
    """The files' own values, or those that training saw, in the dtype it rounded the others to."""
    if used is None:
        return Values()
    dtype = dtype_name(getattr(torch, used["weights_dtype"]))
    return Values(used, _find_quantised(base, used["tensors"], entries), dtype, frozenset(used.get("kept", ())))


def _find_quantised(
    base: Base, proofs: Mapping[str, JsonMapping], entries: Mapping[str, TensorEntry]
) -> dict[str, Sequence[Part]]:
    """Where the weights of quantised layers lie: as the run noted it, else by the class."""
    found = {path: parts for path, proof in proofs.items() if (parts := _noted_parts(proof))}
    require_parts(found, rows_of(entries), str(base.path))
    others = proofs.keys() - found.keys()
    return {**found, **(read_class_parts(base, others, entries) if others else {})}


def _noted_parts(proof: JsonMapping) -> tuple[Part, ...]:
    """Where a quantised weight lies; none by a run of an earlier lorafit, which noted nothing or names of tensors."""
    parts = proof.get("parts", ["the layer's own"])
    return () if parts and all(isinstance(part, str) for part in parts) else read_parts(parts)
