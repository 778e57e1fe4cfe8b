"""Rows in an order that their file tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from lorafit.kinds.curricula import Curriculum, CurriculumSection, MeasurableRows, curricula


class ColumnSection(CurriculumSection):
    """How hard a row is, a number in a column of its file says."""

    kind: Literal["column"] = "column"
    column: Annotated[str, Field(min_length=1)] = "difficulty"
    """The column, as the files of `data.train` call it; every row must have a number there."""
    easiest_is: Literal["lowest", "highest"] = "lowest"
    """Whether a low or a high number says that a row is easy."""


@curricula.register(ColumnSection)
class Column(Curriculum[ColumnSection]):
    """Source: Bengio et al., "Curriculum learning" (2009): an order that whoever knows the rows gives."""

    @property
    def measures(self) -> str:
        """The column's name."""
        return self.section.column

    @property
    def sign(self) -> int:
        """As the section says."""
        return 1 if self.section.easiest_is == "lowest" else -1

    def measure(self, rows: MeasurableRows) -> Sequence[float]:
        """The numbers of the column."""
        return rows.numbers(self.section.column)
