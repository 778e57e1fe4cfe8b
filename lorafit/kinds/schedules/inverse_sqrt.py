"""Decay with the inverse square root of the step."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorafit.kinds.schedules import Schedule, ScheduleSection, schedules

_DEFAULT_TIMESCALE_STEPS = 10_000  # Source: transformers, get_inverse_sqrt_schedule


class InverseSqrtSection(ScheduleSection):
    """1 / sqrt(1 + steps since warm-up / timescale_steps); the run's length does not change it."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    timescale_steps: int | None = Field(default=None, ge=1)
    """Steps after which the learning rate is 0.71 of the peak; null: the steps of warm-up, or 10000 without one."""


@schedules.register(InverseSqrtSection)
class InverseSqrt(Schedule[InverseSqrtSection]):
    """Source: Zhai et al., Scaling Vision Transformers, 2022, appendix; transformers' get_inverse_sqrt_schedule."""

    def factor(self, progress_steps: int, decay_steps: int, warmup_steps: int) -> float:
        """(1 + progress / timescale) ** -1/2."""
        timescale_steps = self.section.timescale_steps or warmup_steps or _DEFAULT_TIMESCALE_STEPS
        return float((1.0 + progress_steps / timescale_steps) ** -0.5)
