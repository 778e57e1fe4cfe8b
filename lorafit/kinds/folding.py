"""How a saved adapter becomes changes of its base's weights: what every method that is merged says of its tensors."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from lorafit.errors import ModelError
    from lorafit.files.safetensors import TensorEntry

BESIDE_A_LAYER = re.compile(r"^base_model\.model\.(?P<path>.+)\.(?P<tensor>(?!weight$)\w+)(?:\.weight)?$")
"""A tensor of an adapter, as PEFT calls most of them."""


_OF_MERGES = re.compile(r"^cannot be merged( as [^:]+)?: ")


def why_unknown(error: ModelError) -> str | None:
    """Why nobody knows what an adapter adds to a weight, as its kind said of a merge; None of another error."""
    why = _OF_MERGES.sub("", error.what)
    return None if why == error.what else why


def compile_layers(pattern: str) -> re.Pattern[str]:
    """PEFT's rule for patterns of ranks, alphas and targets: one matches the end of a path, from a dot on."""
    return re.compile(rf"(.*\.)?({pattern})$")


class Fold(ABC):
    """The change of some rows of one matrix, in the orientation of the base's files, computed a few rows at a time.

    Attributes:
        scaling: The number that all of `factors`' left one has been multiplied by.
    """

    scaling: float = 1.0

    @abstractmethod
    def apply(self, weight: torch.Tensor, first_row: int, out: torch.Tensor) -> None:
        """Writes the changed rows, computed in fp32 and rounded once.

        Args:
            weight: Rows of the base's weight, any float dtype: `[rows, columns]`.
            first_row: The first of them, counted from where the fold begins.
            out: The result in the dtype that is written; may be `weight` itself.
        """

    @abstractmethod
    def error(self, weight: torch.Tensor, written: torch.Tensor, first_row: int) -> float:
        """The largest |written - exact| over its rounding bound, exact values in fp64; NaN where one is.

        Another thread may call it while `apply` runs.
        """

    @abstractmethod
    def update(self, weight: torch.Tensor, first_row: int) -> torch.Tensor:
        """What it adds to some rows of the base's weight, fp64."""

    def factors(self, columns: int | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Left `[rows, r]` and right `[r, columns]` in fp64, whose product is added to all rows; None where none is.

        Args:
            columns: Of the base's weight; None where they are not known, which some products need.
        """
        return None


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """A layer that an adapter changes, known by the headers of its file.

    Attributes:
        tensors: The adapter's, by part (`Folding.parts`).
        key: What PEFT matches patterns of ranks and alphas with: the layer's path, or the parameter's own name.
        matrices: Matrices stacked in its weight in the base's files, one for each expert; 1 for a linear.
        transposed: Whether they lie `[in, out]` there, as GPT-2's, and as embeddings.
    """

    tensors: Mapping[str, TensorEntry]
    key: str
    matrices: int = 1
    transposed: bool = False


class Folding(ABC):
    """How one adapter's tensors become changes of weights.

    Attributes:
        parts: What PEFT calls the tensors beside a layer, and which part of its update each is; a layer has all parts.
        shared: Tensors of the whole adapter, by their full names, which are parts of every layer.
        copies: What PEFT calls the copy of a layer, each parameter of which is folded by itself, as its part `copy`.
        new_weight: The formula of what becomes of W.
    """

    parts: ClassVar[Mapping[str, str]]
    shared: ClassVar[Mapping[str, str]] = {}
    copies: ClassVar[str | None] = None
    new_weight: ClassVar[str]

    def place(self, tensor: str) -> tuple[str, str] | None:
        """The layer that a tensor of the adapter belongs to, and which part it is; None where it is beside no layer."""
        match = BESIDE_A_LAYER.match(tensor)
        return (match["path"], self.parts[match["tensor"]]) if match and match["tensor"] in self.parts else None

    @abstractmethod
    def shape(self, layer: AdaptedLayer) -> tuple[int | None, int | None]:
        """Rows and columns of one matrix of a layer's weight, as it lies in the base's files.

        None where the adapter's tensors do not tell, and the base's own count holds.

        Raises:
            ModelError: Its tensors do not go together; without a place, which the caller knows.
        """

    @abstractmethod
    def fold(
        self, layer: AdaptedLayer, matrix: int, first_row: int, stop_row: int, read: Callable[[int, int], torch.Tensor]
    ) -> Fold:
        """The change of some rows of one matrix of a layer's weight.

        Args:
            layer: Of which `shape` was asked before.
            matrix: Its number.
            first_row: First row of that matrix.
            stop_row: One behind the last.
            read: Gives rows of the base's weight, counted from `first_row`, for methods that must see them all first.
        """

    def fold_bias(self, layer: AdaptedLayer, first_row: int, stop_row: int) -> Fold | None:
        """The change of the bias of some of a layer's outputs; None for most methods, which leave it as it is."""
        return None
