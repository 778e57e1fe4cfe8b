"""bitsandbytes' Lion, with 8-bit or 32-bit state, paged or not."""

from __future__ import annotations

from typing import Literal

from lorafit.kinds.optimizers import (
    Betas,
    BitsandbytesOptimizer,
    EightBitSection,
    OptimizerSection,
    PagedSection,
    WeightDecay,
    optimizers,
)


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

    optimizer = "Lion"
    moments = 1
