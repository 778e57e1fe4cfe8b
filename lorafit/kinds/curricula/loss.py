"""Rows first that the model is already good at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lorafit.kinds.curricula import Curriculum, CurriculumSection, MeasurableRows, curricula


class LossSection(CurriculumSection):
    """Rows first that the model is good at before it is trained: how hard a row is, its loss at step 0 says."""

    kind: Literal["loss"] = "loss"


@curricula.register(LossSection)
class Loss(Curriculum[LossSection]):
    """Source: Hacohen & Weinshall, "On the power of curriculum learning in training deep networks" (2019)."""

    reads_losses = True

    @property
    def measures(self) -> str:
        """The loss."""
        return "loss at step 0"

    def measure(self, rows: MeasurableRows) -> Sequence[float]:
        """The loss of each row, per unit that it is averaged over."""
        return rows.losses()
