"""A and B both drawn, of rows and columns that are at right angles, so that their product is zero all the same.

    Q [r, r] orthogonal        A = Q_odd^T Y / 10,  B = X Q_even / 10        B A = X Q_even Q_odd^T Y / 100 = 0

Both have gradients from the first step on, where B of zeros leaves A without one.

Source: https://datta0.github.io/posts/rethink-lora-init/, "orthogonal initialisation", which PEFT has taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lorafit.kinds.initialisations import Initialisation, InitialisationSection, Start, initialisations
from lorafit.kinds.initialisations._layers import fresh_layers

if TYPE_CHECKING:
    from peft import PeftModel

    from lorafit.facts import LinearShape


class OrthogonalSection(InitialisationSection):
    """A and B drawn at right angles."""

    kind: Literal["orthogonal"] = "orthogonal"
    """Both drawn, their product zero; the rank must be even."""


@initialisations.register(OrthogonalSection)
class Orthogonal(Initialisation[OrthogonalSection]):
    """PEFT's, which the rounding of A and B leaves a little off zero."""

    def why_not_rank(self, rank: int, linear: LinearShape) -> str | None:
        """Half of Q's rows are A's, half B's."""
        return f"an orthogonal start parts the ranks in two halves, and rank {rank} is odd" if rank % 2 else None

    def start(self, model: PeftModel, start: Start) -> str | None:
        """Draws every A and B."""
        import torch

        for layer in fresh_layers(model):
            shape = layer.peft.out_features, layer.peft.in_features
            layer.fill(*layer.peft_factors(torch.empty(shape), "orthogonal"))
        return None
