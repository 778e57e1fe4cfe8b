"""Two names of one method are not told apart more often than luck allows; a real difference is."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from lorafit.kinds.metrics import metrics
from lorafit.studies.standings import Standing, family_quantiles, groups, stand, t_quantile

LOSS, ACCURACY = metrics.get("loss"), metrics.get("accuracy")
ROWS = 60
RECORDED = json.loads((Path(__file__).parents[2] / "support" / "recorded_losses.json").read_text(encoding="utf-8"))
"""Summed losses and tokens of 40 test rows by 12 runs of one tiny recipe that differ in their seed alone."""


def made(random: np.random.Generator, methods: int, *, seeds: float, rows: float, runs: float) -> dict[str, np.ndarray]:
    """Sums of methods that are the same, three seeds each.

    What scatters, as standard deviations of a token's loss: what a seed does to a run; what a method makes of a row;
    what a single run makes of a row. A seed does as much to all methods, and rows are hard for all alike.
    """
    tokens = random.integers(5, 60, ROWS).astype(float)
    loss = 2 + random.gamma(2, 0.3, ROWS) + random.normal(0, 2 * seeds, (1, 3, 1))
    loss = loss + random.normal(0, seeds, (methods, 3, 1)) + random.normal(0, rows, (methods, 1, ROWS))
    loss = loss + random.normal(0, runs, (methods, 3, ROWS))
    sums = np.stack([loss * tokens, np.broadcast_to(tokens, loss.shape)], axis=-1)
    return {f"method {number}": each for number, each in enumerate(sums)}


def losses(sums: dict[str, np.ndarray], *, base: np.ndarray | None = None, resamples: int = 200) -> list[Standing]:
    return stand(LOSS, sums, base, seed=1, resamples=resamples)["loss"]


@pytest.mark.parametrize(("df", "t"), [(1, 12.706), (2, 4.3027), (4, 2.7764), (10, 2.2281), (1e4, 1.9602)])
def test_students_t_is_that_of_the_tables(df: float, t: float) -> None:
    assert t_quantile(df) == pytest.approx(t, rel=2e-3)


def test_all_pairs_of_two_methods_are_bounded_as_one_pair_is_by_students_t() -> None:
    seeds, rows, _ = family_quantiles(2, 3)
    assert seeds == pytest.approx(4.3027, rel=0.04)
    assert rows == pytest.approx(1.96, rel=0.02)
    assert family_quantiles(9, 3)[1] == pytest.approx(4.387 / math.sqrt(2), rel=0.02)  # Tukey's range of 9, df infinite


@pytest.mark.parametrize("methods", [2, 9])
@pytest.mark.parametrize(
    ("seeds", "rows", "runs"), [(0.01, 0, 0.001), (0, 0, 0.05), (0.005, 0.05, 0.02)], ids=["seeds", "runs", "all"]
)
def test_methods_that_are_the_same_are_told_apart_in_at_most_5_percent(
    methods: int, seeds: float, rows: float, runs: float
) -> None:
    random, repeats = np.random.default_rng(methods), 100 if methods == 2 else 50
    wrong = sum(
        bool(groups(losses(made(random, methods, seeds=seeds, rows=rows, runs=runs)))[1]) for _ in range(repeats)
    )
    noise = 1.96 * math.sqrt(0.05 * 0.95 / repeats)
    assert wrong / repeats <= 0.05 + noise


def test_runs_of_one_recipe_under_two_names_are_not_told_apart() -> None:
    """Recorded row losses: all ways to give 12 runs two names of three seeds, but a few of each of the many alike."""
    tokens = np.array(RECORDED["tokens"], dtype=float)
    runs = [np.stack([np.array(of_run), tokens], axis=-1) for of_run in RECORDED["losses"]]
    ways = list(combinations(range(len(runs)), 6))
    random = np.random.default_rng(0)
    wrong, repeats = 0, 200
    for number in random.choice(len(ways), repeats, replace=False):
        order = random.permutation(ways[number])
        one, other = (np.stack([runs[seed] for seed in half]) for half in (order[:3], order[3:]))
        wrong += bool(groups(losses({"one": one, "other": other}))[1])
    assert wrong <= repeats // 20


def test_rows_alone_would_tell_them_apart_by_luck_of_the_seeds() -> None:
    """What the interval is made of matters: seeds scatter more than 60 rows do, and there are three of them."""
    random, repeats, wrong = np.random.default_rng(3), 100, 0
    for _ in range(repeats):
        one, other = made(random, 2, seeds=0.01, rows=0.0, runs=0.01).values()
        difference = ((one - other)[:, :, 0] / one[:, :, 1]).mean(axis=0)
        wrong += abs(difference.mean()) > 1.96 * difference.std(ddof=1) / math.sqrt(ROWS)
    assert wrong > repeats // 2


@pytest.mark.parametrize("seeds", [0.0, 0.01, 0.04])
def test_an_interval_is_made_of_both_variances(seeds: float) -> None:
    one, other = made(np.random.default_rng(5), 2, seeds=seeds, rows=0.05, runs=0.02).values()
    standings = losses({"one": one, "other": other}, resamples=4000)
    best, worse = sorted(standings, key=lambda each: each.value)
    values = [each[:, :, 0].sum(axis=1) / each[:, :, 1].sum(axis=1) for each in (one, other)]
    assert [each.value for each in standings] == pytest.approx([value.mean() for value in values])
    of_seeds = (values[0] - values[1]).var(ddof=1) / 3
    share = one[0, :, 1] / one[0, :, 1].mean()
    lost = [
        (each[:, :, 0] / each[:, :, 1] - value[:, None]) * share
        for each, value in zip((one, other), values, strict=True)
    ]
    of_rows = (lost[0] - lost[1]).mean(axis=0).var(ddof=1) / ROWS  # the bootstrap's variance, by the delta method
    seed_part = of_seeds / (of_seeds + of_rows)
    df = 1 / (seed_part**2 / 2 + (1 - seed_part) ** 2 / (ROWS - 1))
    by_seeds, by_rows, _ = family_quantiles(2, 3)
    factor = max(t_quantile(df), by_rows + (by_seeds - by_rows) * seed_part)
    assert worse.difference == pytest.approx(worse.value - best.value)
    half = (worse.difference_high - worse.difference_low) / 2
    assert half == pytest.approx(factor * math.sqrt(of_seeds + of_rows), rel=0.06)


def test_a_method_that_diverged_loses_whatever_its_own_runs_scatter() -> None:
    random = np.random.default_rng(7)
    sums = made(random, 9, seeds=0.005, rows=0.0, runs=0.05)
    broken = sums["method 8"].copy()
    broken[:, :, 0] += np.array([4.0, 5.5, 7.0])[:, None] * broken[:, :, 1]
    same, worse = groups(losses({**sums, "method 8": broken}))
    assert worse == ["method 8"]
    assert len(same) == 8


def test_the_base_stands_beside_the_methods_and_is_none_of_them() -> None:
    sums = made(np.random.default_rng(9), 3, seeds=0.005, rows=0.0, runs=0.02)
    base = sums["method 0"][0] * np.array([1.3, 1.0])
    *methods, last = losses(sums, base=base)
    assert (last.method, last.verdict, len(last.by_seed)) == ("base", "worse", 1)
    assert "base" not in [*groups([*methods, last])[0], *groups([*methods, last])[1]]
    assert [each.difference for each in methods] == [each.difference for each in losses(sums)]


def test_shares_of_rows_keep_a_width_where_all_rows_are_right() -> None:
    right = np.ones((3, 20, 2))
    wrong = right.copy()
    wrong[:, :15, 0] = 0
    best, worse = stand(ACCURACY, {"all": right, "some": wrong}, None, seed=0, resamples=200)["accuracy"]
    assert (best.value, best.verdict, worse.verdict) == (1.0, "best", "worse")
    assert 0.8 < best.low < best.high == 1.0
    alike = stand(ACCURACY, {"all": right, "too": right.copy()}, None, seed=0, resamples=200)["accuracy"][1]
    assert alike.verdict == "not distinguishable"
    assert alike.difference_low < -0.1 < 0.1 < alike.difference_high  # 20 rows do not say that none would differ
    few = stand(ACCURACY, {"all": right[:, :5], "some": wrong[:, :5]}, None, seed=0, resamples=200)["accuracy"]
    assert few[1].verdict == "too few rows"
