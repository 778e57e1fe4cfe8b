"""bitsandbytes' RMSprop, with 8-bit or 32-bit state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lorafit.kinds.optimizers import (
    EightBitSection,
    OptimizerSection,
    WeightDecay,
    optimizers,
    quantized_state_bytes,
)

if TYPE_CHECKING:
    import torch


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


class _BnbRMSprop:
    """Source: Tieleman & Hinton, lecture 6.5, 2012; 8-bit state: Dettmers et al., 2022. It has no momentum there."""

    def state_bytes(self, section: _RMSpropOptions, parameters: int) -> int:
        """The mean of squares, 8-bit with its constants or fp32."""
        return quantized_state_bytes(parameters) if isinstance(section, EightBitSection) else 4 * parameters

    def is_paged(self, section: _RMSpropOptions) -> bool:
        """Never."""
        return False

    def build(
        self,
        section: _RMSpropOptions,
        parameters: Iterable[torch.nn.Parameter],
        learning_rate: float,
        device: torch.device,
    ) -> torch.optim.Optimizer:
        """bitsandbytes' RMSprop."""
        import bitsandbytes.optim

        eight_bit = isinstance(section, EightBitSection)
        optimizer: torch.optim.Optimizer = bitsandbytes.optim.RMSprop(
            parameters,
            lr=learning_rate,
            alpha=section.alpha,
            eps=section.eps,
            weight_decay=section.weight_decay,
            optim_bits=8 if eight_bit else 32,
            **({"min_8bit_size": section.min_8bit_size} if isinstance(section, EightBitSection) else {}),
        )
        return optimizer


@optimizers.register("rmsprop_bnb_8bit")
class RMSprop8bit(_BnbRMSprop):
    """8-bit state."""

    section = RMSprop8bitSection


@optimizers.register("rmsprop_bnb_32bit")
class RMSprop32bit(_BnbRMSprop):
    """fp32 state."""

    section = RMSprop32bitSection
