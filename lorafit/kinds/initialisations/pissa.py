"""PiSSA: the largest singular values of each weight are trained, and the rest of it stays frozen.

    W = U S V^T        A = sqrt(S_r) V_r^T / sqrt(s),  B = U_r sqrt(S_r) / sqrt(s)        W_res = W - s B A

W_res is not made: the adapter's held half takes the part out, so that the base stays what it was, quantised or not.

Source: Meng et al. 2024, PiSSA (https://arxiv.org/abs/2404.02948), equations 2 to 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from lorafit.kinds.initialisations import Start, initialisations
from lorafit.kinds.initialisations._layers import DecomposedSection, Decomposing, fresh_layers

if TYPE_CHECKING:
    from peft import PeftModel


class PissaSection(DecomposedSection):
    """The weights' largest singular values."""

    kind: Literal["pissa"] = "pissa"
    """Principal singular values and vectors (PiSSA)."""


@initialisations.register(PissaSection)
class Pissa(Decomposing[PissaSection]):
    """PEFT's, on the weight as the model computes with it."""

    corrects: ClassVar[bool] = True
    usual_rate: ClassVar[float] = 0.1  # Source: https://github.com/GraphPKU/PiSSA, scripts/pissa.sh: 2e-5

    def start(self, model: PeftModel, start: Start) -> str | None:
        """Decomposes every weight."""
        iterations = self.section.iterations
        kind = "pissa" if iterations is None else f"pissa_niter_{iterations}"
        for layer in fresh_layers(model):
            layer.fill(*layer.peft_factors(layer.weight(), kind))
        return None
