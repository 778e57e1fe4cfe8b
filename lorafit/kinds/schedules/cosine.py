"""Half a cosine from the peak down."""

from __future__ import annotations

import math
from typing import Literal

from lorafit.kinds.schedules import Ratio, Schedule, ScheduleSection, schedules


class CosineSection(ScheduleSection):
    """Half a cosine from the peak to min_ratio of it."""

    kind: Literal["cosine"] = "cosine"
    min_ratio: Ratio = 0.0
    """Share of the peak learning rate at the end (0 to 1)."""


@schedules.register(CosineSection)
class Cosine(Schedule[CosineSection]):
    """Source: Loshchilov & Hutter, SGDR, 2017, eq. 5, with one period."""

    def factor(self, progress_steps: int, decay_steps: int, warmup_steps: int) -> float:
        """min + (1 - min) * (1 + cos(pi * progress)) / 2."""
        progress = progress_steps / max(1, decay_steps)
        return self.section.min_ratio + (1.0 - self.section.min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
