"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated

from pydantic import Field, model_validator

from lorafit.kinds.registry import Kind, S_co, SectionRegistry
from lorafit.kinds.section import KindSection

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
"""A share of the peak learning rate."""


class ScheduleSection(KindSection):
    """What every schedule's section has: its warm-up."""

    warmup_ratio: float | None = Field(default=None, ge=0.0, le=1.0)
    """Share of all steps in which the learning rate climbs linearly from 0 (0 to 1). Not together with warmup_steps."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps in which the learning rate climbs linearly from 0. Not together with warmup_ratio."""

    @model_validator(mode="after")
    def _one_warmup(self) -> ScheduleSection:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError("warmup_ratio and warmup_steps are both set; keep one")
        return self


class Schedule(Kind[S_co]):
    """One shape of the learning rate after warm-up."""

    @abstractmethod
    def factor(self, progress_steps: int, decay_steps: int, warmup_steps: int) -> float:
        """Multiplier of the peak learning rate, `progress_steps` after warm-up ended, of `decay_steps` in all."""


schedules: SectionRegistry[Schedule[ScheduleSection]] = SectionRegistry("schedule", "lorafit.kinds.schedules")


def warmup_steps(section: ScheduleSection, total_steps: int) -> int:
    """Steps of warm-up of a run of `total_steps`; a ratio is rounded up, and warm-up never outlasts the run."""
    if section.warmup_steps is not None:
        return min(section.warmup_steps, total_steps)
    return min(math.ceil((section.warmup_ratio or 0.0) * total_steps), total_steps)


def learning_rate_at(section: ScheduleSection, peak: float, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (1 to `total_steps`): a pure function.

        step                1 .. W                  W + 1 .. N
        learning rate       peak * step / (W + 1)   peak * factor((step - 1 - W) / (N - W))

    The first step of warm-up is not 0 (which would waste it), the first step behind it is the peak, and the last step
    is not 0 either. transformers' schedules are the same behind the warm-up, and count it from 0.

    Source: nanoGPT, train.py, get_lr, https://github.com/karpathy/nanoGPT.
    """
    warmup = warmup_steps(section, total_steps)
    if step <= warmup:
        return peak * step / (warmup + 1)
    return peak * schedules.bind(section).factor(step - 1 - warmup, total_steps - warmup, warmup)
