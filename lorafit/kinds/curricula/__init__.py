"""Curricula: steps are drawn from the easiest rows first, and from more and more of them until from all.

    step      1 ............................ until * N ............. N
    share     easiest ──root or linear──> 1  rows as without a curriculum

A kind says how hard each row is; how fast the harder ones are let in is the same for all kinds.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from lorafit.kinds.registry import Kind, S_co, SectionRegistry
from lorafit.kinds.section import KindSection


class CurriculumSection(KindSection):
    """What every curriculum's section has: how fast harder rows are let in."""

    easiest: float = Field(default=0.3, gt=0.0, lt=1.0)
    """Share of an epoch's rows, the easiest ones, that step 1 is drawn from (0 to 1)."""
    until: float = Field(default=0.5, gt=0.0, le=1.0)
    """Share of the run's steps in which it grows to all rows (0 to 1)."""
    pace: Literal["root", "linear"] = "root"
    """How it grows: `linear` lets in as many rows each step; `root` more at first, while there are few to draw from."""


@dataclass(frozen=True)
class MeasurableRows:
    """What a curriculum may ask of the training rows, by row number.

    Attributes:
        lengths: Tokens of each.
        losses: Gives the loss of each under the model as it is before step 1, per trained token or other unit.
        numbers: Gives what each has in a column of its file.
    """

    lengths: Sequence[int]
    losses: Callable[[], Sequence[float]]
    numbers: Callable[[str], Sequence[float]]


class Curriculum(Kind[S_co]):
    """One measure of how hard a row is.

    Attributes:
        reads_losses: Whether it asks the model, which takes a forward pass over all rows before step 1.
    """

    reads_losses: ClassVar[bool] = False

    @property
    def sign(self) -> int:
        """1 where large numbers say that a row is hard, -1 where small ones do."""
        return 1

    @property
    @abstractmethod
    def measures(self) -> str:
        """What it measures, in a few words."""

    @abstractmethod
    def measure(self, rows: MeasurableRows) -> Sequence[float]:
        """A number for each row."""


curricula: SectionRegistry[Curriculum[CurriculumSection]] = SectionRegistry("curriculum", "lorafit.kinds.curricula")


def share_at(section: CurriculumSection, step: int, total_steps: int) -> float:
    """Share of the rows, the easiest ones, that a step (1 to `total_steps`) is drawn from: a pure function.

    With c0 = easiest, T = until * total_steps, t = step - 1, and p = 1 (linear) or 2 (root):

        c(t) = min(1, (t (1 - c0^p) / T + c0^p)^(1/p))

    Source: Platanios et al., "Competence-based Curriculum Learning for Neural Machine Translation"
    (2019), its competence, linear and root.
    """
    progress = (step - 1) / (section.until * total_steps)
    if progress >= 1.0:
        return 1.0
    power = 2 if section.pace == "root" else 1
    first = section.easiest**power
    return float((progress * (1.0 - first) + first) ** (1.0 / power))


def pool_size(share: float, rows: int, least: int) -> int:
    """How many of an epoch's rows a share of them is; enough for a step."""
    return max(least, math.ceil(share * rows))
