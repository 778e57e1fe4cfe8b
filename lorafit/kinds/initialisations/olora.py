"""OLoRA: an orthonormal basis of each weight's first columns is trained, with the rows that belong to it.

    W = Q R        B = Q_r,  A = R_r        W_res = W - s B A

W_res is not made: the adapter's held half takes the part out, so that the base stays what it was, quantised or not.

Source: Büyükakyüz 2024, OLoRA (https://arxiv.org/abs/2406.01775), algorithm 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from lorafit.kinds.initialisations import InitialisationSection, Start, initialisations
from lorafit.kinds.initialisations._layers import Decomposing, fresh_layers

if TYPE_CHECKING:
    from peft import PeftModel


class OloraSection(InitialisationSection):
    """The weights' QR decomposition."""

    kind: Literal["olora"] = "olora"
    """Orthonormal basis by QR (OLoRA)."""


@initialisations.register(OloraSection)
class Olora(Decomposing[OloraSection]):
    """PEFT's, on the weight as the model computes with it."""

    corrects: ClassVar[bool] = True
    matrices: ClassVar[int] = 3

    def start(self, model: PeftModel, start: Start) -> str | None:
        """Decomposes every weight."""
        for layer in fresh_layers(model):
            layer.fill(*layer.peft_factors(layer.weight(), "olora"))
        return None
