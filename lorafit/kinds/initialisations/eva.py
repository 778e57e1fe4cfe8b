"""EVA: A begins with the directions in which a layer's inputs vary most, B with zero.

    X [tokens, in], its mean taken off        X = U S V^T        A = V_r^T,  B = 0

    explained variance of direction i = S_i^2 / sum of all S^2

X is what the layer gets while training rows run through the base. The paper deals ranks out anew by explained variance;
here every layer keeps the rank of the recipe.

Source: Paischer et al. 2024, EVA (https://arxiv.org/abs/2410.07170), sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorafit.errors import DataError
from lorafit.kinds.initialisations import Initialisation, RowsSection, Start, initialisations
from lorafit.kinds.initialisations._layers import FP32_BYTES, FreshLayer, fresh_layers

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from lorafit.facts import LinearShape

_SEED = 42  # of PEFT's randomised decomposition, as PEFT has it


class EvaSection(RowsSection):
    """Directions in which the layers' inputs vary most."""

    kind: Literal["eva"] = "eva"
    """Principal components of what layers see (EVA)."""


@initialisations.register(EvaSection)
class Eva(Initialisation[EvaSection]):
    """PEFT's incremental decomposition in one pass over the rows; PEFT's own loop goes on until it has converged."""

    starts_as_base: ClassVar[bool] = True

    @property
    def reads(self) -> str | None:
        """Training rows."""
        return "train"

    def why_not_rank(self, rank: int, linear: LinearShape) -> str | None:
        """Inputs have no more directions than values."""
        if rank <= linear.in_features:
            return None
        return f"{linear.name} gets {linear.in_features} values, which have fewer directions than rank {rank}"

    def memory_bytes(self, linears: Sequence[LinearShape], rank: int) -> int:
        """Components, mean and variance of all linears, and inputs that wait for twice as many tokens as ranks."""
        return (3 * rank + 4) * FP32_BYTES * sum(linear.in_features * linear.count for linear in linears)

    def start(self, model: PeftModel, start: Start) -> str | None:
        """Looks at what every layer gets.

        Raises:
            DataError: The rows have fewer tokens than a layer's rank.
        """
        import torch

        layers, seen = list(fresh_layers(model)), _Seen()
        start.forward("train", self.section.rows, {layer.path: partial(seen.see, layer) for layer in layers})
        shares = {path: components.finish() for path, components in seen.components.items()}
        for layer in layers:
            if layer.path in shares:  # what no row runs through keeps LoRA's
                held = seen.components[layer.path].components
                layer.fill(held, torch.zeros(layer.peft.out_features, layer.rank))
        least = min(shares, key=lambda path: shares[path])
        mean = sum(shares.values()) / len(shares)
        return f"eva: A holds {mean:.1%} of what layers see, the least {shares[least]:.1%} in {least}"


class _Seen:
    """What layers see, by their paths; those that get one and the same tensor in the first row have one entry."""

    def __init__(self) -> None:
        self.components: dict[str, _Components] = {}
        self._leaders = set[str]()
        self._last: tuple[torch.Tensor, _Components] | None = None

    def see(self, layer: FreshLayer, inputs: torch.Tensor) -> None:
        """Takes the inputs of one row of a layer."""
        if layer.path not in self.components:
            last = self._last
            is_shared = last is not None and last[0] is inputs and last[1].rank == layer.rank
            if last is None or not is_shared:
                self._leaders.add(layer.path)
                last = inputs, _Components(layer.rank)
            self.components[layer.path] = last[1]
        self._last = inputs, self.components[layer.path]
        if layer.path in self._leaders:
            self._last[1].see(inputs)


class _Components:
    """Principal components of the inputs of one layer, as they come in.

    Args:
        rank: How many.
    """

    def __init__(self, rank: int) -> None:
        self.rank, self._waiting = rank, list[Any]()
        self._pca: Any = None
        self.tokens = 0

    @property
    def components(self) -> torch.Tensor:
        """[rank, in], the one that explains most first."""
        found: torch.Tensor = self._pca.components_
        return found

    def see(self, inputs: torch.Tensor) -> None:
        """Takes the inputs of one row, or keeps them until there are enough to be decomposed."""
        self._waiting.append(inputs)
        self.tokens += len(inputs)
        if sum(map(len, self._waiting)) >= 2 * self.rank:
            self._fit()

    def finish(self) -> float:
        """The share of the inputs' variance that the components explain (0 to 1).

        Raises:
            DataError: There were fewer inputs than components.
        """
        if sum(map(len, self._waiting)) >= self.rank:
            self._fit()
        if self._pca is None:
            raise DataError(
                f"eva looked at {self.tokens} tokens, and rank {self.rank} takes as many at least",
                key="adapter.init.rows",
                todo="raise it, or lower adapter.r",
            )
        return float(self._pca.explained_variance_ratio_.sum())

    def _fit(self) -> None:
        import torch
        from peft.utils.incremental_pca import IncrementalPCA

        inputs = torch.cat(self._waiting)
        self._waiting = []
        if self._pca is None:
            self._pca = IncrementalPCA(self.rank, lowrank=2 * self.rank <= min(inputs.shape), lowrank_seed=_SEED)
        self._pca.partial_fit(inputs)
