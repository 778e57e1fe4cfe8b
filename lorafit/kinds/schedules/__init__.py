"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

from typing import Any, Protocol

from pydantic import Field, model_validator

from lorafit.kinds.section import Section
from lorafit.registry import Registry


class ScheduleSection(Section):
    """What every schedule's section has: its warm-up."""

    kind: str
    warmup_ratio: float | None = Field(default=None, ge=0.0, le=1.0)
    """Share of all steps in which the learning rate climbs linearly from 0 (0 to 1). Not together with warmup_steps."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps in which the learning rate climbs linearly from 0. Not together with warmup_ratio."""

    @model_validator(mode="after")
    def _one_warmup(self) -> ScheduleSection:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError("warmup_ratio and warmup_steps are both set; keep one")
        return self


class Schedule(Protocol):
    """One shape of the learning rate after warm-up."""

    section: type[Any]

    def factor(self, section: Any, progress_steps: int, decay_steps: int, warmup_steps: int) -> float:
        """Multiplier of the peak learning rate, `progress_steps` after warm-up ended, of `decay_steps` in all."""


schedules: Registry[Schedule] = Registry("schedule", "lorafit.kinds.schedules")
