"""bitsandbytes' AdamW, Lion and RMSprop, with 8-bit or 32-bit state, paged or not."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorafit.kinds.optimizers import (
    AdamWOptions,
    Betas,
    BitsandbytesOptimizer,
    EightBitSection,
    OptimizerSection,
    PagedSection,
    WeightDecay,
    optimizers,
)


class AdamW8bitSection(AdamWOptions, EightBitSection):
    """AdamW of bitsandbytes, blockwise 8-bit state: about 2 bytes a trainable parameter."""

    kind: Literal["adamw_8bit"] = "adamw_8bit"


class PagedAdamW8bitSection(AdamWOptions, EightBitSection, PagedSection):
    """adamw_8bit whose state moves to host memory when a GPU runs full; unpaged on a CPU."""

    kind: Literal["paged_adamw_8bit"] = "paged_adamw_8bit"


class AdamW32bitSection(AdamWOptions):
    """AdamW of bitsandbytes, fp32 state: 8 bytes a trainable parameter."""

    kind: Literal["adamw_bnb_32bit"] = "adamw_bnb_32bit"


class PagedAdamW32bitSection(AdamWOptions, PagedSection):
    """adamw_bnb_32bit whose state moves to host memory when a GPU runs full; unpaged on a CPU."""

    kind: Literal["paged_adamw_32bit"] = "paged_adamw_32bit"


@optimizers.register(AdamW8bitSection, PagedAdamW8bitSection, AdamW32bitSection, PagedAdamW32bitSection)
class BnbAdamW(BitsandbytesOptimizer[AdamWOptions]):
    """Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2."""

    builds = "bitsandbytes.optim:AdamW"
    moments = 2


class _LionOptions(OptimizerSection):
    betas: Betas = (0.9, 0.99)
    """Share of the old momentum in the update's direction, and its decay (each 0 to below 1)."""
    weight_decay: WeightDecay = 0.0
    """Decoupled decay of the adapter's weights."""


class Lion8bitSection(_LionOptions, EightBitSection):
    """Lion of bitsandbytes, blockwise 8-bit state: about 1 byte a trainable parameter."""

    kind: Literal["lion_8bit"] = "lion_8bit"


class PagedLion8bitSection(_LionOptions, EightBitSection, PagedSection):
    """lion_8bit whose state moves to host memory when a GPU runs full; unpaged on a CPU."""

    kind: Literal["paged_lion_8bit"] = "paged_lion_8bit"


class Lion32bitSection(_LionOptions):
    """Lion of bitsandbytes, fp32 state: 4 bytes a trainable parameter."""

    kind: Literal["lion_32bit"] = "lion_32bit"


class PagedLion32bitSection(_LionOptions, PagedSection):
    """lion_32bit whose state moves to host memory when a GPU runs full; unpaged on a CPU."""

    kind: Literal["paged_lion_32bit"] = "paged_lion_32bit"


@optimizers.register(Lion8bitSection, PagedLion8bitSection, Lion32bitSection, PagedLion32bitSection)
class BnbLion(BitsandbytesOptimizer[_LionOptions]):
    """Source: Chen et al., Symbolic Discovery of Optimization Algorithms, 2023, program 1."""

    builds = "bitsandbytes.optim:Lion"
    moments = 1


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

    builds = "bitsandbytes.optim:RMSprop"
    moments = 1
