"""Parameter-efficient methods: what is trained beside the frozen base."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from lorafit.kinds.registry import Kind, S_co, SectionRegistry
from lorafit.kinds.section import PATH, KindSection

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lorafit.contracts import StepHook
    from lorafit.facts import LinearShape, ModelShape


class AdapterSection(KindSection):
    """What every adapter's section has."""

    init_from: str | None = Field(default=None, json_schema_extra=PATH)
    """Folder of an adapter to go on from, relative to the recipe; r, alpha and targets must agree with it."""


class Adapter(Kind[S_co]):
    """One method. `build` attaches it to a loaded base; the rest is arithmetic for plan and memory.

    Attributes:
        closed_form: Whether `memory` has formulas for its step, which are LoRA's; any other is estimated by a dry run.
    """

    closed_form: ClassVar[bool] = False

    @abstractmethod
    def targets(self, shape: ModelShape) -> tuple[LinearShape, ...]:
        """The linears that get an adapter. Raises RecipeError where a target matches nothing."""

    @abstractmethod
    def trainable_parameters(self, linear: LinearShape) -> int:
        """Trainable parameters on all `linear.count` layers of this kind."""

    @abstractmethod
    def rank(self) -> int:
        """Width of the bottleneck; what its activations grow with."""

    @abstractmethod
    def build(self, model: torch.nn.Module, target_modules: Sequence[str], seed: int) -> torch.nn.Module:
        """The PEFT model with a fresh adapter called `default` (fp32 weights), ready to train."""

    def step_hook(self, model: torch.nn.Module) -> StepHook | None:
        """What the method does between steps; None for most."""
        return None


adapters: SectionRegistry[Adapter[AdapterSection]] = SectionRegistry("adapter", "lorafit.kinds.adapters")
