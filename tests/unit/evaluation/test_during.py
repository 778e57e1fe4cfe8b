"""Held-out rows that a model answers while it is trained."""

from __future__ import annotations

from typing import Any

import pytest

from lorafit.answering.engine import Engine
from lorafit.answering.sampling import Sampling
from lorafit.contracts import Silent
from lorafit.errors import DataError
from lorafit.evaluation.during import ask_during, evaluate_during
from lorafit.evaluation.runner import evaluate_pair
from tests.unit.evaluation.test_isolation import build_objective

NAMES = ["rouge", "loss", "exact_match"]
SHORT = Sampling(6, num_beams=2)


class PartOf:
    """One of three processes; `sum` remembers what it gave, and gives what all of them together gave before."""

    ranks = 3

    def __init__(self, rank: int, whole: list[list[float]] | None = None) -> None:
        self.rank, self.given, self._whole = rank, list[list[float]](), iter(whole or [])

    def sum(self, values: Any) -> list[float]:
        self.given.append(list(values))
        return next(self._whole, list(values))


@pytest.fixture
def ask(tuned: Any, tokenizer: Any, make_rows: Any) -> Any:
    """Gives what `evaluate_during` finds of five rows, the last of which no ROUGE can score."""
    rows, questions = make_rows([("a", "bé c"), ("b c", "x y z"), ("d", "e"), ("e f g", "h"), ("g", "...")])
    engine, objective = Engine(tuned, tokenizer), build_objective(tuned)
    asked = ask_during(engine, questions, NAMES, SHORT, [])

    def measure(ranks: Any = None) -> dict[str, float]:
        more = {"micro_batch_tokens": 64, "pad_id": 257}
        return evaluate_during(objective, rows, NAMES, ranks=ranks, questions=asked, **more)

    measure.pair = lambda: evaluate_pair(  # type: ignore[attr-defined]
        engine,
        objective,
        rows,
        questions,
        NAMES,
        sampling=SHORT,
        stop_ids=[],
        micro_batch_tokens=64,
        seed=0,
        reporter=Silent(),
    )
    return measure


def test_answers_while_training_score_as_an_evaluation_of_the_same_rows_does(ask: Any) -> None:
    found = ask()
    assert found == {line.name: pytest.approx(line.tuned) for line in ask.pair().comparisons}
    assert {"loss", "rougeL", "exact_match"} < found.keys()


def test_processes_answer_a_part_each_and_find_the_same(ask: Any) -> None:
    alone, parts = ask(), [PartOf(rank) for rank in range(3)]
    for part in parts:
        ask(part)
    whole = [[sum(each) for each in zip(*given, strict=True)] for given in zip(*(p.given for p in parts), strict=True)]
    assert all(ask(PartOf(rank, whole)) == pytest.approx(alone) for rank in range(3))


def test_a_metric_that_can_score_no_row_is_told_before_the_first_step(make_rows: Any) -> None:
    _, questions = make_rows([("a", "..."), ("b", "!")])
    engine: Any = None
    said = r"rouge can score none of the 2 validation rows: it needs a row whose reference holds letters or digits"
    with pytest.raises(DataError, match=said) as caught:
        ask_during(engine, questions, ["loss", "rouge"], SHORT, [])
    assert caught.value.key == "evaluation.during"
    assert ask_during(engine, questions, ["loss"], SHORT, []) is None
