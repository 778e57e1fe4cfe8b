"""CorDA: weights are decomposed by what rows make of them, and the directions that a task uses are told from others.

    C = X^T X over the inputs of a layer        W C = U S V^T        W = U S (V^T C^-1)

    ipm   the r largest values of S are trained: what the rows of the task use most
    kpm   the r smallest: what rows whose answers shall stay use least

The adapter's held half takes what is trained out of the base again, which stays what it was.

Source: Yang et al. 2024, CorDA (https://arxiv.org/abs/2406.05223), equations 1 to 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from lorafit.kinds.initialisations import RowsSection, Start, initialisations
from lorafit.kinds.initialisations._layers import FP32_BYTES, Decomposing, FreshLayer, fresh_layers

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from lorafit.facts import LinearShape

_LEAST_DAMPING, _MOST_ERROR = 0.01, 0.05
_COVARIANCES_BYTES = 256 << 20
"""Of the matrices C that are there at once; the rows run once for each such group of layers."""


class CordaSection(RowsSection):
    """Directions of the weights that rows use."""

    kind: Literal["corda"] = "corda"
    """Context-oriented decomposition (CorDA)."""
    mode: Literal["ipm", "kpm"] = "ipm"
    """`ipm`: train what training rows use most; `kpm`: train what the rows of evaluation.retention use least."""


@initialisations.register(CordaSection)
class Corda(Decomposing[CordaSection]):
    """PEFT's arithmetic in own code: PEFT's wants plain linears, all covariances at once, and the package attrs."""

    corrects: ClassVar[bool] = True
    usual_rate: ClassVar[float] = 0.1  # as PiSSA's; Source: docs/adapters.md, "First steps of each"

    @property
    def reads(self) -> str | None:
        """Rows of the task, or those whose answers shall stay."""
        return "train" if self.section.mode == "ipm" else "retention"

    def memory_bytes(self, linears: Sequence[LinearShape], rank: int) -> int:
        """A group of covariances, the largest with its inverse and what that takes, and the decomposition."""
        squares = [FP32_BYTES * linear.in_features**2 for linear in linears]
        all_of_them = sum(size * linear.count for size, linear in zip(squares, linears, strict=True))
        largest = max(squares, default=0)
        group = max(largest, min(_COVARIANCES_BYTES, all_of_them))
        return group + 4 * largest + super().memory_bytes(linears, rank)

    def start(self, model: PeftModel, start: Start) -> str | None:
        """Decomposes every weight, some layers at a time."""
        for group in _groups(list(fresh_layers(model))):
            covariances = {layer.path: _Covariance() for layer in group}
            seers = {path: covariance.see for path, covariance in covariances.items()}
            start.forward(str(self.reads), self.section.rows, seers)
            for layer in group:
                covariance = covariances.pop(layer.path)
                if covariance.rows:  # what no row runs through keeps LoRA's
                    u, s, vh = _decompose(layer.weight(), covariance.mean)
                    r = layer.rank
                    chosen = slice(r) if self.section.mode == "ipm" else slice(len(s) - r, None)
                    layer.fill_product(u[:, chosen], s[chosen], vh[chosen])
        return None


def _decompose(weight: torch.Tensor, covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, S and V^T C^-1. As in PEFT, C gets so much on its diagonal that it has an inverse, 1 % of its mean first."""
    import torch

    identity = torch.eye(len(covariance), device=covariance.device)
    share = _LEAST_DAMPING
    while True:
        damped = covariance + share * covariance.diag().mean() * identity
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, identity) < _MOST_ERROR:
            break
        share *= 2
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    return u, s, vh @ inverse


class _Covariance:
    """The mean of X^T X over rows, each scaled by its largest value, as PEFT has it."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self.rows = 0

    def see(self, inputs: torch.Tensor) -> None:
        """Adds a row's."""
        if not (largest := inputs.max().abs()):
            return
        scaled = inputs / largest
        product = scaled.t() @ scaled
        self._sum = product if self._sum is None else self._sum.add_(product)
        self.rows += 1

    @property
    def mean(self) -> torch.Tensor:
        """[in, in]."""
        assert self._sum is not None, "asked of what has seen rows"
        return self._sum / self.rows


def _groups(layers: list[FreshLayer]) -> list[list[FreshLayer]]:
    """Layers in order, as many together as have room for their covariances."""
    groups, room = list[list[FreshLayer]](), 0
    for layer in layers:
        size = FP32_BYTES * int(layer.peft.in_features) ** 2
        if not groups or size > room:
            groups.append([])
            room = _COVARIANCES_BYTES
        groups[-1].append(layer)
        room -= size
    return groups
