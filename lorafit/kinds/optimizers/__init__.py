"""Optimizers by their usual names."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import BeforeValidator, Field

from lorafit.kinds.registry import Kind, S_co, SectionRegistry
from lorafit.kinds.section import KindSection

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Decay of a running mean."""

Betas = Annotated[tuple[Beta, Beta], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]
"""Two decays; a list where the recipe is YAML, which has no tuples."""

WeightDecay = Annotated[float, Field(ge=0.0, le=1.0)]
"""Off by default: decay pulls an adapter towards doing nothing, the low rank regularises already, and dropout on the
adapter is the usual means (Source: QLoRA's training script, https://github.com/artidoro/qlora, `weight_decay` 0.0)."""

_QUANTIZED_BLOCK = 256  # Source: bitsandbytes, blockwise optimizer states; an fp32 absmax for each 256 values
_MIN_8BIT_VALUES = 4096  # Source: bitsandbytes' default of min_8bit_size


class OptimizerSection(KindSection):
    """What every optimizer's section has."""


class EightBitSection(OptimizerSection):
    """What every optimizer with 8-bit state has."""

    min_8bit_size: int = Field(default=_MIN_8BIT_VALUES, ge=1)
    """Parameter tensors with fewer values than this keep fp32 state."""


class PagedSection(OptimizerSection):
    """What every optimizer has whose state can leave the GPU (CUDA only)."""


class Optimizer(Kind[S_co]):
    """One optimizer: its memory and how it is built."""

    @abstractmethod
    def state_bytes(self, parameters: int) -> int:
        """Bytes of optimizer state for that many fp32 trainable parameters (in large tensors)."""

    @property
    def is_paged(self) -> bool:
        """Whether its state can leave the GPU (CUDA only)."""
        return isinstance(self.section, PagedSection)

    @abstractmethod
    def build(
        self, parameters: Iterable[torch.nn.Parameter], learning_rate: float, device: torch.device
    ) -> torch.optim.Optimizer:
        """The optimizer over `parameters`. On a CPU a paged one is built unpaged."""


optimizers: SectionRegistry[Optimizer[OptimizerSection]] = SectionRegistry("optimizer", "lorafit.kinds.optimizers")


class TorchOptimizer(Optimizer[S_co]):
    """An optimizer of torch whose constructor calls its options as the section does."""

    optimizer: ClassVar[str]
    """Its class in `torch.optim`."""

    def build(
        self, parameters: Iterable[torch.nn.Parameter], learning_rate: float, device: torch.device
    ) -> torch.optim.Optimizer:
        """torch's optimizer with the section's values."""
        import torch

        options = self.section.model_dump(exclude={"kind"})
        optimizer: torch.optim.Optimizer = getattr(torch.optim, self.optimizer)(parameters, lr=learning_rate, **options)
        return optimizer


class BitsandbytesOptimizer(Optimizer[S_co]):
    """An optimizer of bitsandbytes: 8-bit state where its section is an `EightBitSection`, paged for a `PagedSection`.

    Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022.
    """

    optimizer: ClassVar[str]
    """Its class in `bitsandbytes.optim`; those called `...8bit` and `Paged...` differ from it in arguments alone."""
    moments: ClassVar[int]
    """Running means that it keeps for each parameter."""

    def state_bytes(self, parameters: int) -> int:
        """A byte a value and an fp32 absmax for each block of 256, or fp32, for each moment."""
        is_8bit = isinstance(self.section, EightBitSection)
        one = parameters + 4 * (parameters // _QUANTIZED_BLOCK) if is_8bit else 4 * parameters
        return self.moments * one

    def build(
        self, parameters: Iterable[torch.nn.Parameter], learning_rate: float, device: torch.device
    ) -> torch.optim.Optimizer:
        """bitsandbytes' optimizer with the section's values."""
        import bitsandbytes.optim

        options = self.section.model_dump(exclude={"kind"})
        if self.is_paged:
            options["is_paged"] = device.type == "cuda"
        optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, self.optimizer)(
            parameters, lr=learning_rate, optim_bits=8 if isinstance(self.section, EightBitSection) else 32, **options
        )
        return optimizer
