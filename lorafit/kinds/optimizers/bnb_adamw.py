"""bitsandbytes' AdamW, with 8-bit or 32-bit state, paged or not."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorafit.kinds.optimizers import (
    Beta,
    BitsandbytesOptimizer,
    EightBitSection,
    OptimizerSection,
    WeightDecay,
    optimizers,
)
from lorafit.kinds.registry import S_co


class _AdamWOptions(OptimizerSection):
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the running mean of gradients and of their squares (each 0 to below 1)."""
    eps: float = Field(default=1e-8, gt=0.0, le=1.0)
    """Added to the root of the second moment."""
    weight_decay: WeightDecay = 0.0
    """Decoupled decay of the adapter's weights."""


class AdamW8bitSection(_AdamWOptions, EightBitSection):
    """AdamW of bitsandbytes, blockwise 8-bit state: about 2 bytes a trainable parameter."""

    kind: Literal["adamw_8bit"] = "adamw_8bit"


class PagedAdamW8bitSection(_AdamWOptions, EightBitSection):
    """adamw_8bit whose state moves to host memory when a GPU runs full; unpaged on a CPU."""

    kind: Literal["paged_adamw_8bit"] = "paged_adamw_8bit"


class AdamW32bitSection(_AdamWOptions):
    """AdamW of bitsandbytes, fp32 state: 8 bytes a trainable parameter."""

    kind: Literal["adamw_bnb_32bit"] = "adamw_bnb_32bit"


class PagedAdamW32bitSection(_AdamWOptions):
    """adamw_bnb_32bit whose state moves to host memory when a GPU runs full; unpaged on a CPU."""

    kind: Literal["paged_adamw_32bit"] = "paged_adamw_32bit"


class _BnbAdamW(BitsandbytesOptimizer[S_co]):
    """Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2."""

    optimizer = "AdamW"
    moments = 2


@optimizers.register(AdamW8bitSection)
class AdamW8bit(_BnbAdamW[AdamW8bitSection]):
    """8-bit state."""


@optimizers.register(PagedAdamW8bitSection)
class PagedAdamW8bit(_BnbAdamW[PagedAdamW8bitSection]):
    """8-bit state, paged."""

    paged = True


@optimizers.register(AdamW32bitSection)
class AdamW32bit(_BnbAdamW[AdamW32bitSection]):
    """fp32 state."""


@optimizers.register(PagedAdamW32bitSection)
class PagedAdamW32bit(_BnbAdamW[PagedAdamW32bitSection]):
    """fp32 state, paged."""

    paged = True
