"""torch's Adam: weight decay, where set, is an L2 penalty on the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lorafit.kinds.optimizers import Beta, Optimizer, OptimizerSection, WeightDecay, optimizers

if TYPE_CHECKING:
    import torch


class AdamSection(OptimizerSection):
    """Adam of torch, fp32 state: 8 bytes a trainable parameter."""

    kind: Literal["adam"] = "adam"
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the running mean of gradients and of their squares (each 0 to below 1)."""
    eps: float = Field(default=1e-8, gt=0.0, le=1.0)
    """Added to the root of the second moment."""
    weight_decay: WeightDecay = 0.0
    """L2 penalty, added to the gradient before the moments (AdamW decays apart from them)."""


@optimizers.register(AdamSection)
class Adam(Optimizer[AdamSection]):
    """Source: Kingma & Ba, Adam: A Method for Stochastic Optimization, 2015, algorithm 1."""

    def state_bytes(self, parameters: int) -> int:
        """Two fp32 moments."""
        return 8 * parameters

    def build(
        self, parameters: Iterable[torch.nn.Parameter], learning_rate: float, device: torch.device
    ) -> torch.optim.Optimizer:
        """torch.optim.Adam."""
        import torch

        return torch.optim.Adam(
            parameters,
            lr=learning_rate,
            betas=self.section.betas,
            eps=self.section.eps,
            weight_decay=self.section.weight_decay,
        )
