"""torch's RMSprop."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorafit.kinds.optimizers import Beta, Optimizer, OptimizerSection, WeightDecay, optimizers


class RMSpropSection(OptimizerSection):
    """RMSprop of torch, fp32 state: 4 bytes a trainable parameter, 4 more with momentum, 4 more if centered."""

    kind: Literal["rmsprop"] = "rmsprop"
    alpha: Beta = 0.99
    """Decay of the running mean of squared gradients (0 to below 1)."""
    eps: float = Field(default=1e-8, gt=0.0, le=1.0)
    """Added to its root."""
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the last step's direction that is kept (0 to below 1)."""
    centered: bool = False
    """Normalise by the variance of the gradient instead of its second moment."""
    weight_decay: WeightDecay = 0.0
    """L2 penalty, added to the gradient."""


@optimizers.register(RMSpropSection)
class RMSprop(Optimizer[RMSpropSection]):
    """Source: Tieleman & Hinton, lecture 6.5 of Neural Networks for Machine Learning, 2012; centered: Graves, 2013."""

    builds = "torch.optim:RMSprop"

    def state_bytes(self, parameters: int) -> int:
        """fp32 squares, and where asked momentum and means."""
        return 4 * parameters * (1 + bool(self.section.momentum) + self.section.centered)
