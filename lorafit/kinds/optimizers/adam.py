"""torch's Adam: weight decay, where set, is an L2 penalty on the gradient."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorafit.kinds.optimizers import Betas, OptimizerSection, TorchOptimizer, WeightDecay, optimizers


class AdamSection(OptimizerSection):
    """Adam of torch, fp32 state: 8 bytes a trainable parameter."""

    kind: Literal["adam"] = "adam"
    betas: Betas = (0.9, 0.999)
    """Decay of the running mean of gradients and of their squares (each 0 to below 1)."""
    eps: float = Field(default=1e-8, gt=0.0, le=1.0)
    """Added to the root of the second moment."""
    weight_decay: WeightDecay = 0.0
    """L2 penalty, added to the gradient before the moments (AdamW decays apart from them)."""


@optimizers.register(AdamSection)
class Adam(TorchOptimizer[AdamSection]):
    """Source: Kingma & Ba, Adam: A Method for Stochastic Optimization, 2015, algorithm 1."""

    optimizer = "Adam"

    def state_bytes(self, parameters: int) -> int:
        """Two fp32 moments."""
        return 8 * parameters
