"""Optimizers by their usual names."""

from __future__ import annotations

from abc import abstractmethod
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import BeforeValidator, Field

from lorafit.contracts import JsonObject
from lorafit.kinds.registry import Kind, S_co, SectionRegistry
from lorafit.kinds.section import KindSection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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


class AdamWOptions(OptimizerSection):
    """What every AdamW's section has."""

    betas: Betas = (0.9, 0.95)
    """Decay of the running mean of gradients and of their squares (each 0 to below 1)."""
    eps: float = Field(default=1e-8, gt=0.0, le=1.0)
    """Added to the root of the second moment."""
    weight_decay: WeightDecay = 0.0
    """Decoupled decay of the adapter's weights."""


class EightBitSection(OptimizerSection):
    """What every optimizer with 8-bit state has."""

    min_8bit_size: int = Field(default=_MIN_8BIT_VALUES, ge=1)
    """Parameter tensors with fewer values than this keep fp32 state."""


class PagedSection(OptimizerSection):
    """What every optimizer has whose state can leave the GPU (CUDA only)."""


class Optimizer(Kind[S_co]):
    """One optimizer: its memory and how it is built.

    Attributes:
        builds: Its class, as `module:name`.
        follows_gradients: Whether its step grows with the size of gradients, so that no rate is a usual one.
    """

    builds: ClassVar[str]
    follows_gradients: ClassVar[bool] = False

    @abstractmethod
    def state_bytes(self, parameters: int) -> int:
        """Bytes of optimizer state for that many fp32 trainable parameters (in large tensors)."""

    @property
    def updates_in_place(self) -> bool:
        """Whether on a GPU its step makes nothing of the adapter's size; else a foreach optimizer's copy of it."""
        return False

    @property
    def waits_at_each_tensor(self) -> bool:
        """Whether on a GPU its step makes the host wait for the device once for each trained tensor."""
        return False

    @property
    def is_paged(self) -> bool:
        """Whether its state can leave the GPU (CUDA only)."""
        return isinstance(self.section, PagedSection)

    def options(self, device: torch.device) -> JsonObject:
        """What its class gets beside parameters and learning rate: the section's values, unless a kind says more."""
        return self.section.model_dump(exclude={"kind"})

    def build(
        self,
        parameters: Iterable[torch.nn.Parameter] | Iterable[JsonObject],
        learning_rate: float,
        device: torch.device,
    ) -> torch.optim.Optimizer:
        """The optimizer over `parameters`, or over groups of `rate_groups`. On a CPU a paged one is built unpaged."""
        optimizer: torch.optim.Optimizer = resolve_name(self.builds)(
            parameters, lr=learning_rate, **self.options(device)
        )
        set_rates(optimizer, learning_rate)
        return optimizer


def rate_groups(named: Iterable[tuple[str, torch.nn.Parameter]], factor_of: Callable[[str], float]) -> list[JsonObject]:
    """torch's parameter groups of trained parameters, one for each factor of the learning rate.

    All else is the same in all of them: the section's weight decay, too.
    """
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in named:
        groups.setdefault(factor_of(name), []).append(parameter)
    return [{"params": parameters, "rate_factor": factor} for factor, parameters in groups.items()]


def set_rates(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Gives each group that learning rate times its own factor, 1 where it names none."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate_factor", 1.0)


optimizers: SectionRegistry[Optimizer[OptimizerSection]] = SectionRegistry("optimizer", "lorafit.kinds.optimizers")


class BitsandbytesOptimizer(Optimizer[S_co]):
    """An optimizer of bitsandbytes: 8-bit state where its section is an `EightBitSection`, paged for a `PagedSection`.

    Its classes called `...8bit` and `Paged...` differ from the plain one in arguments alone.

    Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022.
    """

    moments: ClassVar[int]
    """Running means that it keeps for each parameter."""

    def state_bytes(self, parameters: int) -> int:
        """A byte a value and an fp32 absmax for each block of 256, or fp32, for each moment."""
        one = parameters + 4 * (parameters // _QUANTIZED_BLOCK) if self._is_8bit else 4 * parameters
        return self.moments * one

    @property
    def updates_in_place(self) -> bool:
        """One kernel a tensor."""
        return True

    @property
    def waits_at_each_tensor(self) -> bool:
        """Source: bitsandbytes 0.50, optim/optimizer.py, `step`."""
        return True

    def options(self, device: torch.device) -> JsonObject:
        """The section's values and the form of the state."""
        paged = {"is_paged": device.type == "cuda"} if self.is_paged else {}
        return {**super().options(device), "optim_bits": 8 if self._is_8bit else 32, **paged}

    @property
    def _is_8bit(self) -> bool:
        return isinstance(self.section, EightBitSection)
