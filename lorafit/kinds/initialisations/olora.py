"""OLoRA: an orthonormal basis of each weight's first columns is trained, with the rows that belong to it.

    W = Q R        B = Q_r,  A = R_r        W_res = W - s B A

W_res is not made: the adapter's held half takes the part out, so that the base stays what it was, quantised or not.

Source: Büyükakyüz 2024, OLoRA (https://arxiv.org/abs/2406.01775), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from lorafit.kinds.initialisations import InitialisationSection, Start, initialisations
from lorafit.kinds.initialisations._layers import Decomposing, fresh_layers

if TYPE_CHECKING:
    from peft import PeftModel

    from lorafit.facts import LinearShape


class OloraSection(InitialisationSection):
    """The weights' QR decomposition."""

    kind: Literal["olora"] = "olora"
    """Orthonormal basis by QR (OLoRA)."""


@initialisations.register(OloraSection)
class Olora(Decomposing[OloraSection]):
    """PEFT's, on the weight as the model computes with it."""

    corrects: ClassVar[bool] = True
    usual_rate: ClassVar[float] = 0.1  # as PiSSA's; Source: docs/adapters.md, "First steps of each"
    matrices: ClassVar[int] = 4

    def start(self, model: PeftModel, start: Start) -> str | None:
        """Decomposes every weight."""
        for layer in fresh_layers(model):
            layer.fill(*layer.peft_factors(layer.weight(), "olora"))
        return None

    def flops(self, linears: Sequence[LinearShape]) -> int:
        """4 m n^2 for each weight of m x n, n the smaller: a QR with its Q."""
        sizes = [(*sorted((linear.in_features, linear.out_features)), linear.count) for linear in linears]
        return sum(4 * m * n**2 * count for n, m, count in sizes)
