"""Short rows first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lorafit.kinds.curricula import Curriculum, CurriculumSection, MeasurableRows, curricula


class LengthSection(CurriculumSection):
    """Short rows first: how hard a row is, its tokens say."""

    kind: Literal["length"] = "length"


@curricula.register(LengthSection)
class Length(Curriculum[LengthSection]):
    """Source: Platanios et al. 2019, difficulty by sentence length."""

    @property
    def measures(self) -> str:
        """Tokens."""
        return "tokens"

    def measure(self, rows: MeasurableRows) -> Sequence[float]:
        """The tokens of each row."""
        return rows.lengths
