"""A power of the share of steps that is left; of power 1, a straight line from the peak down."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorafit.kinds.schedules import Ratio, Schedule, ScheduleSection, schedules


class LinearSection(ScheduleSection):
    """A straight line from the peak to min_ratio of it."""

    kind: Literal["linear"] = "linear"
    min_ratio: Ratio = 0.0
    """Share of the peak learning rate at the end (0 to 1)."""


class PolynomialSection(ScheduleSection):
    """(1 - progress) ** power, from the peak to min_ratio of it."""

    kind: Literal["polynomial"] = "polynomial"
    power: float = Field(default=1.0, gt=0.0, le=10.0)
    """Exponent; 1 is linear, more falls faster at first."""
    min_ratio: Ratio = 0.0
    """Share of the peak learning rate at the end (0 to 1)."""


@schedules.register(LinearSection, PolynomialSection)
class Polynomial(Schedule[LinearSection | PolynomialSection]):
    """Source: transformers, get_polynomial_decay_schedule_with_warmup; of power 1, get_linear_schedule_with_warmup."""

    def factor(self, progress_steps: int, decay_steps: int, warmup_steps: int) -> float:
        """min + (1 - min) * (1 - progress) ** power."""
        remaining = 1.0 - progress_steps / max(1, decay_steps)
        power = self.section.power if isinstance(self.section, PolynomialSection) else 1.0
        return float(self.section.min_ratio + (1.0 - self.section.min_ratio) * remaining**power)
