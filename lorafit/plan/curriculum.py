"""What a curriculum makes of a run's steps, in numbers of the plan."""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.kinds.curricula import curricula, pool_size, share_at
from lorafit.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class PacedSteps:
    """Which steps are drawn from the easiest rows only, and how often rows are seen for that.

    Attributes:
        measures: What tells how hard a row is.
        pace: How the share of rows grows.
        first_share: Of an epoch's rows, what step 1 is drawn from (0 to 1).
        all_from_step: The first step that is made of all rows; one behind the last where none is.
        easiest_seen: How often the easiest row of an epoch is seen in the whole run, on average over seeds.
        hardest_seen: The same of the hardest one.
    """

    measures: str
    pace: str
    first_share: float
    all_from_step: int
    easiest_seen: float
    hardest_seen: float

    def __str__(self) -> str:
        first = f"step 1 of the easiest {self.first_share:.0%}, all from step {self.all_from_step:,} on ({self.pace})"
        seen = f"the easiest row is seen {self.easiest_seen:.1f} times, the hardest {self.hardest_seen:.1f}"
        return f"by {self.measures}: {first}; {seen}"


def pace_steps(recipe: Recipe, rows: int, steps_per_epoch: int, total_steps: int) -> PacedSteps | None:
    """The numbers of a run of so many rows an epoch; None without a curriculum."""
    section, batch_size = recipe.training.curriculum, recipe.training.batch_size
    if section is None:
        return None
    easiest = hardest = 0.0
    all_from_step = total_steps + 1
    for step in range(1, total_steps + 1):
        taken = min(batch_size, rows - (step - 1) % steps_per_epoch * batch_size)
        share = share_at(section, step, total_steps)
        pool = pool_size(share, rows, taken)
        easiest += taken / pool
        hardest += taken / rows if pool == rows else 0.0
        all_from_step = min(all_from_step, step) if share >= 1.0 else all_from_step
    kind = curricula.bind(section)
    return PacedSteps(kind.measures, section.pace, section.easiest, all_from_step, easiest, hardest)
