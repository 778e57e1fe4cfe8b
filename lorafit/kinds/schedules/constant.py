"""The peak, to the end."""

from __future__ import annotations

from typing import Literal

from lorafit.kinds.schedules import Schedule, ScheduleSection, schedules


class ConstantSection(ScheduleSection):
    """The peak learning rate from the end of warm-up on; the run's length does not change it."""

    kind: Literal["constant"] = "constant"


@schedules.register(ConstantSection)
class Constant(Schedule[ConstantSection]):
    """No decay."""

    def factor(self, progress_steps: int, decay_steps: int, warmup_steps: int) -> float:
        """1."""
        return 1.0
