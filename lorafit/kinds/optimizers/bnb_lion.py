"""bitsandbytes' Lion, with 8-bit or 32-bit state, paged or not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from lorafit.kinds.optimizers import (
    Beta,
    EightBitSection,
    OptimizerSection,
    WeightDecay,
    optimizers,
    quantized_state_bytes,
)

if TYPE_CHECKING:
    import torch


class _LionOptions(OptimizerSection):
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Share of the old momentum in the update's direction, and its decay (each 0 to below 1)."""
    weight_decay: WeightDecay = 0.0
    """Decoupled decay of the adapter's weights."""


class Lion8bitSection(_LionOptions, EightBitSection):
    """Lion of bitsandbytes, blockwise 8-bit state: about 1 byte a trainable parameter."""

    kind: Literal["lion_8bit"] = "lion_8bit"


class PagedLion8bitSection(_LionOptions, EightBitSection):
    """lion_8bit whose state moves to host memory when a GPU runs full; unpaged on a CPU."""

    kind: Literal["paged_lion_8bit"] = "paged_lion_8bit"


class Lion32bitSection(_LionOptions):
    """Lion of bitsandbytes, fp32 state: 4 bytes a trainable parameter."""

    kind: Literal["lion_32bit"] = "lion_32bit"


class PagedLion32bitSection(_LionOptions):
    """lion_32bit whose state moves to host memory when a GPU runs full; unpaged on a CPU."""

    kind: Literal["paged_lion_32bit"] = "paged_lion_32bit"


class _BnbLion:
    """Source: Chen et al., Symbolic Discovery of Optimization Algorithms, 2023, program 1."""

    paged: ClassVar[bool] = False

    def state_bytes(self, section: _LionOptions, parameters: int) -> int:
        """One momentum, 8-bit with its constants or fp32."""
        return quantized_state_bytes(parameters) if isinstance(section, EightBitSection) else 4 * parameters

    def is_paged(self, section: _LionOptions) -> bool:
        """Whether its state can leave the GPU."""
        return self.paged

    def build(
        self,
        section: _LionOptions,
        parameters: Iterable[torch.nn.Parameter],
        learning_rate: float,
        device: torch.device,
    ) -> torch.optim.Optimizer:
        """bitsandbytes' Lion."""
        import bitsandbytes.optim

        eight_bit = isinstance(section, EightBitSection)
        optimizer: torch.optim.Optimizer = bitsandbytes.optim.Lion(
            parameters,
            lr=learning_rate,
            betas=section.betas,
            weight_decay=section.weight_decay,
            optim_bits=8 if eight_bit else 32,
            is_paged=self.paged and device.type == "cuda",
            **({"min_8bit_size": section.min_8bit_size} if isinstance(section, EightBitSection) else {}),
        )
        return optimizer


@optimizers.register("lion_8bit")
class Lion8bit(_BnbLion):
    """8-bit state."""

    section = Lion8bitSection


@optimizers.register("paged_lion_8bit")
class PagedLion8bit(_BnbLion):
    """8-bit state, paged."""

    section = PagedLion8bitSection
    paged = True


@optimizers.register("lion_32bit")
class Lion32bit(_BnbLion):
    """fp32 state."""

    section = Lion32bitSection


@optimizers.register("paged_lion_32bit")
class PagedLion32bit(_BnbLion):
    """fp32 state, paged."""

    section = PagedLion32bitSection
    paged = True
