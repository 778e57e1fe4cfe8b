"""bitsandbytes' RMSprop, with 8-bit or 32-bit state."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorafit.kinds.optimizers import (
    BitsandbytesOptimizer,
    EightBitSection,
    OptimizerSection,
    WeightDecay,
    optimizers,
)


class _RMSpropOptions(OptimizerSection):
    alpha: float = Field(default=0.99, gt=0.0, lt=1.0)
    """Decay of the running mean of squared gradients (above 0, below 1)."""
    eps: float = Field(default=1e-8, gt=0.0, le=1.0)
    """Added to its root."""
    weight_decay: WeightDecay = 0.0
    """L2 penalty, added to the gradient."""


class RMSprop8bitSection(_RMSpropOptions, EightBitSection):
    """RMSprop of bitsandbytes, blockwise 8-bit state: about 1 byte a trainable parameter."""

    kind: Literal["rmsprop_bnb_8bit"] = "rmsprop_bnb_8bit"


class RMSprop32bitSection(_RMSpropOptions):
    """RMSprop of bitsandbytes, fp32 state: 4 bytes a trainable parameter."""

    kind: Literal["rmsprop_bnb_32bit"] = "rmsprop_bnb_32bit"


@optimizers.register(RMSprop8bitSection, RMSprop32bitSection)
class BnbRMSprop(BitsandbytesOptimizer[_RMSpropOptions]):
    """Source: Tieleman & Hinton, lecture 6.5, 2012. It has no momentum there."""

    optimizer = "RMSprop"
    moments = 1
