"""Where a row may have several labels: above which probability each is given, chosen for F1 on validation rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lorafit.kinds.metrics import RowScore, metrics
from lorafit.kinds.tasks import tasks
from lorafit.kinds.tasks._thresholds import choose_thresholds


def f1(given: Any, right: Any) -> float:
    return float(2 * (given & right).sum() / max(1, given.sum() + right.sum()))


def test_no_other_threshold_has_a_better_f1() -> None:
    rng = np.random.default_rng(0)
    right = rng.random((60, 3)) < np.array([0.1, 0.4, 0.0])
    shares = np.clip(0.3 * right + 0.7 * rng.random((60, 3)) ** 2, 0, 1)
    tried = np.linspace(0.001, 0.999, 999)
    each = choose_thresholds(shares, right.astype(float), each=True)
    for place in range(2):
        best = max(f1(shares[:, place] > one, right[:, place]) for one in tried)
        assert f1(shares[:, place] > each[place], right[:, place]) >= best
    assert each[2] == 0.5, "no row has the class: nothing can be chosen"
    (one, *others) = choose_thresholds(shares, right.astype(float), each=False)
    assert others == [one] * 2 and f1(shares > one, right) >= max(f1(shares > other, right) for other in tried)


@pytest.mark.parametrize(
    ("shares", "right", "wanted"),
    [([0.1, 0.9], [0, 1], 0.5), ([0.1, 0.2], [0, 1], 0.15), ([0.7, 0.9], [0, 1], 0.8), ([0.0, 0.0], [1, 0], 0.5)],
)
def test_a_threshold_lies_between_two_rows_and_at_the_default_where_that_is_as_good(
    shares: list[float], right: list[int], wanted: float
) -> None:
    (chosen,) = choose_thresholds(np.array(shares)[:, None], np.array(right, float)[:, None], each=True)
    assert chosen == pytest.approx(wanted)


def test_a_task_takes_what_its_rows_decide_again_each_time() -> None:
    task: Any = tasks.make("sequence-classification", labels=["a", "b"], multi_label=True, threshold="f1_each")
    assert task.thresholds == [0.5, 0.5] and task.chosen_options == ("threshold",)
    shares = [((0.3, 0.9), (1.0, 1.0)), ((0.1, 0.7), (0.0, 0.0))]
    rows = [{"shares": one, "classes": classes, "predicted": (0.0, 1.0), "weight": (1.0,)} for one, classes in shares]
    chosen, decided = task.choose(rows)
    assert chosen.thresholds == pytest.approx([0.2, 0.8])
    assert [row["predicted"] for row in decided] == [(1.0, 1.0), (0.0, 0.0)]
    again, _ = chosen.choose([{**rows[0], "shares": (0.9, 0.9)}, {**rows[1], "shares": (0.1, 0.1)}])
    assert again.thresholds == [0.5, 0.5]
    fixed: Any = tasks.make("sequence-classification", labels=["a", "b"], multi_label=True, threshold=0.3)
    assert fixed.choose(rows) == (fixed, rows) and fixed.thresholds == [0.3, 0.3] and not fixed.chosen_options


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"threshold": 0.4}, "set multi_label: true"),
        ({"threshold": "f1"}, "set multi_label: true"),
        ({"multi_label": True, "thresholds": [0.1, 0.2, 0.3], "labels": ["a", "b"]}, "3 values for 2 classes"),
    ],
)
def test_thresholds_that_mean_nothing_are_refused(options: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        tasks.make("sequence-classification", **options)


def test_micro_f1_counts_all_decisions_together() -> None:
    """By hand: two of three given classes are right, and two of four classes are found."""
    pairs = [((1.0, 1.0, 0.0), (1.0, 0.0, 1.0)), ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0)), ((0.0,) * 3, (0.0,) * 3)]
    rows = [RowScore({"predicted": given, "classes": there, "weight": (1.0,)}) for given, there in pairs]
    metric = metrics.get("micro_f1")
    sums = np.asarray(metric.row_sums(rows))
    assert metric.values(sums.sum(axis=0).tolist())["micro_f1"] == pytest.approx(2 * 2 / (3 + 4))
    assert metric.values(sums[2].tolist())["micro_f1"] == 1.0
