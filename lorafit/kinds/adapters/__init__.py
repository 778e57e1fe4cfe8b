"""Parameter-efficient methods: what is trained beside the frozen base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from lorafit.kinds.registry import Registry
from lorafit.kinds.section import Section

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lorafit.contracts import StepHook
    from lorafit.facts import LinearShape, ModelShape


class AdapterSection(Section):
    """What every adapter's section has."""

    kind: str


class Adapter(Protocol):
    """One method. `build` attaches it to a loaded base; the rest is arithmetic for plan and memory."""

    section: type[Any]

    def targets(self, section: Any, shape: ModelShape) -> tuple[LinearShape, ...]:
        """The linears that get an adapter. Raises RecipeError where a target matches nothing."""

    def trainable_parameters(self, section: Any, linear: LinearShape) -> int:
        """Trainable parameters on all `linear.count` layers of this kind."""

    def rank(self, section: Any) -> int:
        """Width of the bottleneck; what its activations grow with."""

    def build(self, section: Any, model: torch.nn.Module, target_modules: Sequence[str], seed: int) -> torch.nn.Module:
        """The PEFT model with a fresh adapter called `default` (fp32 weights), ready to train."""

    def step_hook(self, section: Any, model: torch.nn.Module) -> StepHook | None:
        """What the method does between steps; None for most."""


adapters: Registry[Adapter] = Registry("adapter", "lorafit.kinds.adapters")
