"""LoftQ: the adapter begins with what quantisation took from each weight, as far as its rank can hold it.

    Q = q(W)        W - Q = U S V^T        A = sqrt(S_r) V_r^T / sqrt(s),  B = U_r sqrt(S_r) / sqrt(s)

No A and B of rank r leave less of ||W - Q - s B A||. The paper goes on in turns, and quantises W - s B A next; that is
another base, to which the adapter would belong alone. Here the base keeps its codes, and the first turn is the whole.

Source: Li et al. 2023, LoftQ (https://arxiv.org/abs/2310.08659), equation 6 and algorithm 1 with T = 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from lorafit.kinds.initialisations import Start, initialisations
from lorafit.kinds.initialisations._layers import DecomposedSection, Decomposing, fresh_layers

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


class LoftqSection(DecomposedSection):
    """What quantisation took from the weights."""

    kind: Literal["loftq"] = "loftq"
    """The error of quantisation (LoftQ); it wants a quantised base."""


@initialisations.register(LoftqSection)
class Loftq(Decomposing[LoftqSection]):
    """Own code, since PEFT's wants a CUDA device and quantises by a table of its own."""

    def refuses(self, quantization_kind: str) -> str | None:
        """Plain weights have lost nothing."""
        if quantization_kind != "none":
            return None
        return "loftq begins with what quantisation took from a weight, and weights that are not quantised lost nothing"

    def start(self, model: PeftModel, start: Start) -> str | None:
        """Decomposes what every weight has lost; one that is stored plainly lost nothing, and keeps LoRA's start."""
        lost = left = whole = 0.0
        for layer in fresh_layers(model):
            original = start.original(layer.path)
            whole += float(original.square().sum())
            residual = original.sub_(layer.weight())
            if not residual.any():
                continue
            u, s, vh = self._decompose(residual, layer.rank)
            layer.fill_product(u, s, vh)
            lost += (size := float(residual.square().sum()))
            left += max(0.0, size - float(s.square().sum()))
        before, after = (math.sqrt(part / whole) for part in (lost, left))
        return f"loftq: of the weights' length quantisation took {before:.2%}, with the adapter {after:.2%}"

    def _decompose(self, residual: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        if self.section.iterations is None:
            u, s, vh = torch.linalg.svd(residual, full_matrices=False)
            return u[:, :rank], s[:rank], vh[:rank]
        u, s, v = torch.svd_lowrank(residual, rank, niter=self.section.iterations)
        return u, s, v.t()
