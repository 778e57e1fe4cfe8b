"""Optimizers by their usual names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from lorafit.kinds.section import Section
from lorafit.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch


class OptimizerSection(Section):
    """What every optimizer's section has."""

    kind: str


class OptimizerKind(Protocol):
    """One optimizer: its memory and how it is built."""

    section: type[Any]

    def state_bytes(self, section: Any, parameters: int) -> int:
        """Bytes of optimizer state for that many fp32 trainable parameters (in large tensors)."""

    def is_paged(self, section: Any) -> bool:
        """Whether its state can leave the GPU (CUDA only)."""

    def build(
        self, section: Any, parameters: Iterable[torch.nn.Parameter], learning_rate: float, device: torch.device
    ) -> torch.optim.Optimizer:
        """The optimizer over `parameters`. On a CPU a paged one is built unpaged."""


optimizers: Registry[OptimizerKind] = Registry("optimizer", "lorafit.kinds.optimizers")
