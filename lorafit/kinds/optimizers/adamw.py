"""torch's AdamW: Adam with decoupled weight decay, fp32 state."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorafit.kinds.optimizers import Betas, OptimizerSection, TorchOptimizer, WeightDecay, optimizers


class AdamWSection(OptimizerSection):
    """AdamW of torch, fp32 state: 8 bytes a trainable parameter."""

    kind: Literal["adamw"] = "adamw"
    betas: Betas = (0.9, 0.95)
    """Decay of the running mean of gradients and of their squares (each 0 to below 1)."""
    eps: float = Field(default=1e-8, gt=0.0, le=1.0)
    """Added to the root of the second moment."""
    weight_decay: WeightDecay = 0.0
    """Decoupled decay of the adapter's weights."""


@optimizers.register(AdamWSection)
class AdamW(TorchOptimizer[AdamWSection]):
    """Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2."""

    optimizer = "AdamW"

    def state_bytes(self, parameters: int) -> int:
        """Two fp32 moments."""
        return 8 * parameters
