"""LoRA that begins with few ranks and gets more at given steps, without a change of what the model computes.

    step    1 .. raise_steps[0] - 1      .. raise_steps[1] - 1      .. the last
    ranks   start_r                      start_r + (r - start_r)/2  r              (two raises)

    h = W x + (alpha / r) B[:, :b] A[:b] x        one scale for the whole run

Of a new rank the column of B is zero, so that nothing jumps, and the row of A has the values it was given at step 0.
Its moments in the optimizer are zero, as those of a fresh parameter; the count of steps is the matrix's own. Saved is a
plain LoRA of rank r, in which ranks that were not reached are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lorafit.contracts import JsonMapping
from lorafit.kinds.adapter_parts import Outcome
from lorafit.kinds.adapters import adapters
from lorafit.kinds.adapters._leading_ranks import LeadingRanks
from lorafit.kinds.adapters._low_rank import LowRank, ProductSection
from lorafit.ops.step_hook import StepHook

if TYPE_CHECKING:
    from peft import PeftModel

    from lorafit.facts import RunFacts

_USUAL_RAISES = 3


class GrowingLoraSection(ProductSection):
    """Low-rank adapters whose rank is raised while they are trained."""

    kind: Literal["growing_lora"] = "growing_lora"
    """LoRA that grows to rank r."""
    start_r: int | None = Field(default=None, ge=1, le=4096)
    """Rank at the start; null: a quarter of r."""
    raise_steps: list[Annotated[int, Field(ge=2)]] | None = Field(default=None, min_length=1)
    """Steps that are the first with a larger rank, e.g. [100, 200]; from start_r to r in equal parts. null: three
    raises in the first half of the run."""

    @model_validator(mode="after")
    def _has_ranks_to_add(self) -> GrowingLoraSection:
        steps = self.raise_steps or []
        if self.first_r >= self.r:
            raise ValueError(f"start_r {self.first_r} must be less than r {self.r}")
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise ValueError(f"raise_steps must rise: {steps}")
        if len(steps) > self.r - self.first_r:
            raise ValueError(f"{len(steps)} raise_steps are more than the {self.r - self.first_r} ranks to add")
        return self

    @property
    def first_r(self) -> int:
        """Rank at the start."""
        return self.start_r if self.start_r is not None else max(1, self.r // 4)


class Growth(LeadingRanks):
    """Lets as many ranks compute as the step has.

    Args:
        model: See `LeadingRanks`.
        section: The recipe's.
        steps: First steps with a larger rank.
    """

    def __init__(self, model: PeftModel, section: GrowingLoraSection, steps: Sequence[int]) -> None:
        super().__init__(model, section.r)
        self._section, self._steps = section, steps

    def rank_at(self, step: int) -> int:
        """Ranks that compute in a step."""
        return _rank_at(self._section, self._steps, step)

    def news(self, step: int) -> str | None:
        """Where the rank is raised."""
        before, now = self.rank_at(step - 1), self.rank_at(step)
        return None if before == now else f"the rank grows from {before} to {now}"

    def before_step(self, step: int) -> None:
        """The first ranks compute, by the scale of all."""
        self.lead(self.rank_at(step), rescaled=False)


def _rank_at(section: GrowingLoraSection, steps: Sequence[int], step: int) -> int:
    start, most = section.first_r, section.r
    return start + (most - start) * sum(first <= step for first in steps) // max(1, len(steps))


@adapters.register(GrowingLoraSection)
class GrowingLora(LowRank[GrowingLoraSection]):
    """PEFT's LoRA of rank r, of which the first ranks are trained first."""

    starts_as_base: ClassVar[bool] = True
    saved_as: ClassVar[str | None] = "lora"

    def raise_steps(self, total_steps: int) -> Sequence[int]:
        """As the recipe says; else in the first half of the run, where each adds a rank at least."""
        section = self.section
        if section.raise_steps is not None:
            return section.raise_steps
        count = min(_USUAL_RAISES, section.r - section.first_r)
        usual = (1 + total_steps * (number + 1) // (2 * count) for number in range(count))
        return sorted({step for step in usual if 1 < step <= total_steps})

    def refuses_steps(self, total_steps: int) -> str | None:
        """Where it would never get to r."""
        steps = self.raise_steps(total_steps)
        if steps and steps[-1] <= total_steps:
            return None
        if not steps:
            return f"a run of {total_steps} steps is too short to raise the rank in"
        return f"raise_steps ends at {steps[-1]}, the run has {total_steps}"

    def outcome(self, config: JsonMapping, step: int, total_steps: int) -> Outcome | None:
        """Where the run's adapter is of a step before the last raise."""
        steps, most = self.raise_steps(total_steps), self.section.r
        rank = _rank_at(self.section, steps, step)
        if rank == most:
            return None
        early = f"the adapter is that of step {step:,}, before rank {most} is reached at step {steps[-1]:,}"
        todo = "lower adapter.raise_steps, to choose among later steps alone"
        return Outcome(f"{rank} of its {most} ranks are trained", {"trained_ranks": rank}, f"{early}; {todo}")

    def step_hook(self, model: PeftModel, run: RunFacts) -> StepHook:
        """Raises the rank."""
        return Growth(model, self.section, self.raise_steps(run.total_steps))
