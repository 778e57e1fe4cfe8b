"""bitsandbytes' AdamW, with 8-bit or 32-bit state, paged or not."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorafit.kinds.optimizers import (
    Betas,
    BitsandbytesOptimizer,
    EightBitSection,
    OptimizerSection,
    PagedSection,
    WeightDecay,
    optimizers,
)


class _AdamWOptions(OptimizerSection):
    betas: Betas = (0.9, 0.95)
    """Decay of the running mean of gradients and of their squares (each 0 to below 1)."""
    eps: float = Field(default=1e-8, gt=0.0, le=1.0)
    """Added to the root of the second moment."""
    weight_decay: WeightDecay = 0.0
    """Decoupled decay of the adapter's weights."""


class AdamW8bitSection(_AdamWOptions, EightBitSection):
    """AdamW of bitsandbytes, blockwise 8-bit state: about 2 bytes a trainable parameter."""

    kind: Literal["adamw_8bit"] = "adamw_8bit"


class PagedAdamW8bitSection(_AdamWOptions, EightBitSection, PagedSection):
    """adamw_8bit whose state moves to host memory when a GPU runs full; unpaged on a CPU."""

    kind: Literal["paged_adamw_8bit"] = "paged_adamw_8bit"


class AdamW32bitSection(_AdamWOptions):
    """AdamW of bitsandbytes, fp32 state: 8 bytes a trainable parameter."""

    kind: Literal["adamw_bnb_32bit"] = "adamw_bnb_32bit"


class PagedAdamW32bitSection(_AdamWOptions, PagedSection):
    """adamw_bnb_32bit whose state moves to host memory when a GPU runs full; unpaged on a CPU."""

    kind: Literal["paged_adamw_32bit"] = "paged_adamw_32bit"


@optimizers.register(AdamW8bitSection, PagedAdamW8bitSection, AdamW32bitSection, PagedAdamW32bitSection)
class BnbAdamW(BitsandbytesOptimizer[_AdamWOptions]):
    """Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2."""

    optimizer = "AdamW"
    moments = 2
