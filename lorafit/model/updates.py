"""The updates of a saved adapter, module by module, beside the weights of its base as it was trained on.

adapter ──its kind's folding──> which rows of the base's files get which fold     as a merge, which writes them
base    ──rows, made again as quantised──> W ──> ||W||, and what the fold adds: its factors, or rows of it
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lorafit.contracts import JsonMapping, Reporter
from lorafit.errors import ModelError
from lorafit.files.safetensors import TensorEntry, read_index, read_rows, row_blocks
from lorafit.kinds.folding import why_unknown
from lorafit.model.merge.merge_targets import plan_updates
from lorafit.model.merge.shards import ALLOWED_DIFFERENCE
from lorafit.model.merge.sources import Sources, Stretch, check_quantization, choose_values
from lorafit.ops.update_matrix import UpdateMatrix

if TYPE_CHECKING:
    from lorafit.kinds.folding import Folding
    from lorafit.model.adapter import AdapterFolder
    from lorafit.model.base import Base

_BESIDE = ("modules_to_save", "trainable_token_indices", "bias")
"""Keys of adapter_config.json about what is trained beside updates of weights."""


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one matrix.

    Attributes:
        shape: Rows and columns as they lie in the base's files; of a vector each value is a row.
        weight_norm: Frobenius norm of the base's weight.
        matrix: The update; None where a tensor of it holds NaN or Inf.
    """

    shape: tuple[int, int]
    weight_norm: float
    matrix: UpdateMatrix | None

    @property
    def ratio(self) -> float | None:
        """||update|| / ||weight||; None where either is not known."""
        return None if self.matrix is None or not self.weight_norm else self.matrix.norm / self.weight_norm


class UpdateReader:
    """Reads the updates of one adapter, each when it is asked for.

    Args:
        adapter: It.
        base: What it was trained on.
        quantization: The run's quantization.json where the base was quantised; None: the files' own values.

    Attributes:
        modules: Paths of the matrices that it changes, in the order of the base's files; of several that are stacked
            in one weight, with the number behind: `experts.gate_up_proj[3]`.
        beside: Its tensors that are no update of a weight: a head saved whole, rows of new tokens, biases.
        rebuilt: Quantised weights that can be made again.

    Raises:
        ModelError: It changes no weight, or does not fit the base.
    """

    def __init__(self, adapter: AdapterFolder, base: Base, quantization: JsonMapping | None) -> None:
        config = {key: value for key, value in adapter.config.items() if key not in _BESIDE}
        try:
            folding = adapter.kind.folding(config)
        except ModelError as error:
            why = why_unknown(error) or error.what
            todo = "only changes of weights are measured; score it with lorafit eval"
            raise ModelError(f"cannot be inspected: {why}", file=str(adapter.path), todo=todo) from error
        folded = {name: entry for name, entry in adapter.tensors.items() if _is_folded(name, folding)}
        self.beside = tuple(name for name in adapter.tensors if name not in folded)
        if not folded:
            todo = "only changes of weights are measured; score it with lorafit eval"
            raise ModelError("cannot be inspected: it changes no weight", file=str(adapter.path), todo=todo)
        entries = read_index(base.path)
        updates = plan_updates(replace(adapter, config=config, tensors=folded), base, entries)
        values = choose_values(base, quantization and check_quantization(quantization, base), entries)
        self._entries, self.rebuilt = entries, len(values.quantised)
        self._sources = Sources(entries, updates, values)
        self._places: dict[str, list[tuple[str, Stretch]]] = {}
        for tensor in entries:
            for stretch in self._sources.stretches[tensor]:
                if (patch := stretch.patch) is not None and not patch.of_bias:
                    several = f"[{patch.matrix}]" if patch.layer.matrices > 1 else ""
                    self._places.setdefault(f"{patch.layer.key}{several}", []).append((tensor, stretch))
        self.modules = tuple(self._places)

    def read(self, module: str) -> Update:
        """One of them.

        Raises:
            NumericsError: The weight that is made again is not the one that training saw.
        """
        squares, rows, columns, pieces, right = 0.0, 0, 0, list[torch.Tensor](), None
        places = sorted(self._places[module], key=lambda place: place[1].patch.first if place[1].patch else 0)
        is_finite = all(map(_is_finite, _tensors(places)))
        for tensor, stretch in places:
            source = self._sources.open(tensor, stretch if is_finite else replace(stretch, patch=None))
            count, columns = stretch.stop - stretch.start, self._entries[tensor].as_matrix().row_elements
            factors = source.fold.factors(columns) if source.fold is not None else None
            if factors is not None:
                pieces.append(factors[0])
                right = factors[1]
            rows += count
            for start, stop in row_blocks(count, columns):
                weight = source.rows.read(stretch.first + start, stretch.first + stop).double()
                squares += float(weight.square().sum())
                if source.fold is not None and factors is None:
                    pieces.append(source.fold.update(weight, start).reshape(stop - start, -1))
        matrix = UpdateMatrix(torch.cat(pieces), right) if is_finite else None
        return Update((rows, columns), math.sqrt(squares), matrix)

    def conclude(self, reporter: Reporter) -> None:
        """Proves what is left of a quantised base, once all modules were read.

        Raises:
            NumericsError: It is not the one that training saw.
        """
        if self._sources.rebuilder is not None:
            self._sources.rebuilder.conclude(ALLOWED_DIFFERENCE, reporter)


def _tensors(places: list[tuple[str, Stretch]]) -> list[TensorEntry]:
    layers: list[Mapping[str, TensorEntry]] = [s.patch.layer.tensors for _, s in places[:1] if s.patch is not None]
    return [entry for layer in layers for entry in layer.values()]


def _is_finite(entry: TensorEntry) -> bool:
    return bool(torch.isfinite(read_rows(entry)).all())


def _is_folded(name: str, folding: Folding) -> bool:
    """Whether a tensor of an adapter is part of an update."""
    copied = folding.copies is not None and re.search(rf"\.{folding.copies}\.\w+$", name) is not None
    return copied or name in folding.shared or folding.place(name) is not None
