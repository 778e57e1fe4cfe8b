"""Steps that are drawn from the easiest rows of their epoch first, and how often rows are seen for that."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.batch import EasyFirst, StepRows, epoch_order
from lorafit.kinds.curricula import curricula, share_at
from lorafit.plan.curriculum import pace_steps
from lorafit.recipe.schema import Recipe

DIFFICULTY = np.array([5.0, 1.0, 3.0, 3.0, 9.0, 0.0, 7.0, 3.0, 2.0, 8.0])


@dataclass
class Rows:
    """One source; all that orders of rows ask for."""

    count: int
    repeats: tuple[float, ...] = (1.0,)

    def __len__(self) -> int:
        return self.count

    @property
    def source_of(self) -> list[int]:
        return [0] * self.count


def steps_of(difficulty: Any, seed: int, batch_size: int, total: int, repeats: float = 1.0, **options: Any) -> StepRows:
    section = curricula.make_section("length", **options)
    easy_first = EasyFirst(np.asarray(difficulty, dtype=np.float64), partial(share_at, section, total_steps=total))
    return StepRows(Rows(len(difficulty), (repeats,)), seed, batch_size, easy_first)  # type: ignore[arg-type]


@pytest.mark.parametrize(("pace", "power"), [("linear", 1), ("root", 2)])
def test_the_share_is_the_papers_competence(pace: str, power: int) -> None:
    """Platanios et al. 2019: c(t) = min(1, (t (1 - c0^p) / T + c0^p)^(1/p)) with c(0) = c0 and c(T) = 1."""
    section: Any = curricula.make_section("length", pace=pace, easiest=0.2, until=0.4)
    length, first = 0.4 * 50, 0.2
    for step in range(1, 51):
        t = step - 1
        wanted = min(1.0, (t * (1 - first**power) / length + first**power) ** (1 / power))
        assert share_at(section, step, 50) == pytest.approx(wanted, abs=1e-12)
    assert share_at(section, 1, 50) == pytest.approx(0.2) and share_at(section, 20, 50) < 1.0
    assert share_at(section, 21, 50) == 1.0


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 6),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from(["root", "linear"]),
    st.lists(st.integers(1, 24), min_size=1, max_size=8),
)
def test_a_step_holds_easy_rows_and_as_many_as_without(
    seed: int, batch_size: int, repeats: float, pace: str, asked: list[int]
) -> None:
    plain = StepRows(Rows(10, (repeats,)), seed, batch_size)  # type: ignore[arg-type]
    paced = steps_of(DIFFICULTY, seed, batch_size, 24, repeats, pace=pace, easiest=0.2, until=0.75)
    section: Any = curricula.make_section("length", pace=pace, easiest=0.2, until=0.75)
    for step in asked:
        (progress, rows), (without, ordinary) = paced.rows(step), plain.rows(step)
        assert progress == without and len(rows) == len(ordinary)
        share = share_at(section, step, 24)
        if share == 1.0:
            assert rows == ordinary
            continue
        order = epoch_order(Rows(10, (repeats,)), seed, (step - 1) // plain.steps_per_epoch)  # type: ignore[arg-type]
        pool = max(len(rows), math.ceil(share * len(order)))
        hardest = sorted(DIFFICULTY[order])[pool - 1]
        assert max(DIFFICULTY[rows]) <= hardest
        assert not Counter(rows) - Counter(order.tolist()), "no row stands in a step more often than in an epoch"


def test_steps_are_functions_of_seed_and_number() -> None:
    steps = range(1, 13)
    forwards = [steps_of(DIFFICULTY, 3, 2, 12).rows(step) for step in steps]
    one = steps_of(DIFFICULTY, 3, 2, 12)
    assert [one.rows(step) for step in reversed(steps)][::-1] == forwards
    assert [steps_of(DIFFICULTY, 4, 2, 12).rows(step) for step in steps] != forwards


def test_the_plan_says_how_often_rows_are_seen() -> None:
    """Against counts over many seeds, with a last step of an epoch that is smaller."""
    values = {"name": "x", "model": {"base": "b"}, "data": {"train": "a.jsonl"}}
    training = {"batch_size": 4, "epochs": 4, "curriculum": {"kind": "length", "easiest": 0.3, "until": 0.5}}
    found = pace_steps(Recipe.model_validate({**values, "training": training}), 10, 3, 12)
    assert found is not None
    seen: Counter[int] = Counter()
    for seed in range(400):
        steps = steps_of(np.arange(10), seed, 4, 12)
        seen.update(row for step in range(1, 13) for row in steps.rows(step)[1])
    assert found.easiest_seen == pytest.approx(seen[0] / 400, rel=0.05)
    assert found.hardest_seen == pytest.approx(seen[9] / 400, rel=0.05)
    assert found.easiest_seen > found.hardest_seen > 1.9  # two epochs of all rows, and some steps whose share rounds up
    assert found.all_from_step == 7
    assert pace_steps(Recipe.model_validate({**values, "training": {"batch_size": 4}}), 10, 3, 12) is None
