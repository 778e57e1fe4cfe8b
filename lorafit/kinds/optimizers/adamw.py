"""torch's AdamW: Adam with decoupled weight decay, fp32 state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lorafit.kinds.optimizers import Beta, Optimizer, OptimizerSection, WeightDecay, optimizers

if TYPE_CHECKING:
    import torch


class AdamWSection(OptimizerSection):
    """AdamW of torch, fp32 state: 8 bytes a trainable parameter."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the running mean of gradients and of their squares (each 0 to below 1)."""
    eps: float = Field(default=1e-8, gt=0.0, le=1.0)
    """Added to the root of the second moment."""
    weight_decay: WeightDecay = 0.0
    """Decoupled decay of the adapter's weights."""


@optimizers.register(AdamWSection)
class AdamW(Optimizer[AdamWSection]):
    """Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2."""

    def state_bytes(self, parameters: int) -> int:
        """Two fp32 moments."""
        return 8 * parameters

    def build(
        self,
        parameters: Iterable[torch.nn.Parameter],
        learning_rate: float,
        device: torch.device,
    ) -> torch.optim.Optimizer:
        """torch.optim.AdamW."""
        import torch

        return torch.optim.AdamW(
            parameters,
            lr=learning_rate,
            betas=self.section.betas,
            eps=self.section.eps,
            weight_decay=self.section.weight_decay,
        )
