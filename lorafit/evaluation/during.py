"""What is measured of held-out rows while a model is trained: its losses and, where a metric reads them, its answers.

all rows ──score──> scores ────────────────────────────┐
the first ones ──each rank answers a part──> answers ──┴──> values by name, alike on every rank
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafit.answering.generate import Request
from lorafit.contracts import Silent
from lorafit.errors import DataError
from lorafit.evaluation.further import as_asked
from lorafit.evaluation.runner import find_asked, measure, score_examples
from lorafit.kinds.metrics import RowScore, metrics
from lorafit.ops.isolation import evaluating

if TYPE_CHECKING:
    from lorafit.answering.engine import Engine
    from lorafit.answering.generate import Answer
    from lorafit.answering.sampling import Sampling
    from lorafit.contracts import Examples, GenerationRow
    from lorafit.evaluation.further import as_asked
from lorafit.evaluation.runner import Ranks


@dataclass(frozen=True, slots=True)
class Questions:
    """Held-out rows that the model in training answers.

    Attributes:
        engine: Around that model.
        rows: Those whose answer a metric reads.
        sampling: How answers are made.
        stop_ids: Tokens that end an answer, beside the model's own.
    """

    engine: Engine
    rows: Sequence[GenerationRow]
    sampling: Sampling
    stop_ids: Sequence[int]

    def answer(self, ranks: Ranks | None) -> dict[int, Answer]:
        """The answers of this rank's part of the rows, by number."""
        first, every = (ranks.rank, ranks.ranks) if ranks is not None else (0, 1)
        numbers, (adapter,) = range(first, len(self.rows), every), self.engine.adapters
        rows = [self.rows[number] for number in numbers]
        requests = [Request.of_row(row, adapter, self.sampling, self.stop_ids) for row in rows]
        return dict(zip(numbers, self.engine.answer(requests), strict=True))


def ask_during(
    engine: Engine,
    rows: Sequence[GenerationRow],
    metric_names: Sequence[str],
    sampling: Sampling,
    stop_ids: Sequence[int],
) -> Questions | None:
    """What is to be answered at each evaluation; None where no metric reads answers.

    Raises:
        DataError: A metric can score none of the rows.
    """
    reading = [name for name in metric_names if metrics.get(name).needs != "scores"]
    for name in reading:
        if not find_asked(rows, [name]):
            what = f"{name} can score none of the {len(rows)} validation rows: it needs {metrics.get(name).condition}"
            raise DataError(what, key="evaluation.during", todo="leave it out, or raise evaluation.answered_rows")
    return Questions(engine, find_asked(rows, reading), sampling, stop_ids) if reading else None


def evaluate_during(
    objective: Any,
    examples: Examples,
    metric_names: Sequence[str],
    *,
    micro_batch_tokens: int,
    pad_id: int,
    ranks: Ranks | None = None,
    questions: Questions | None = None,
) -> dict[str, float]:
    """What the training loop asks for between steps: values by name, the loss always among them.

    Modes, random numbers, weights and NF4 packing are as before the call, so that evaluating does not change training;
    but the objective's task becomes the one with what these rows decide.
    """
    with evaluating(objective):
        scores = score_examples(
            objective, examples, micro_batch_tokens=micro_batch_tokens, pad_id=pad_id, reporter=Silent(), ranks=ranks
        )
    objective.task, chosen = objective.task.choose([score.sums for score in scores])
    scores = [replace(score, sums=sums) for score, sums in zip(scores, chosen, strict=True)]
    read = [name for name in dict.fromkeys(metric_names) if metrics.get(name).needs != "scores"]
    found = measure(["loss", *(name for name in metric_names if name not in ("loss", *read))], scores)
    if questions is not None:
        answers = questions.answer(ranks)
        for name in read:
            found |= _measure_answers(name, questions.rows, answers, ranks)
    return found


def _measure_answers(
    name: str, asked: Sequence[GenerationRow], answers: Mapping[int, Answer], ranks: Ranks | None
) -> dict[str, float]:
    """A metric over the rows that it can score, whoever answered them."""
    metric, rows, own = metrics.get(name), list[RowScore](), list[bool]()
    for number, row in enumerate(asked):
        answer = answers.get(number)
        text, written = (answer.text, answer.written) if answer is not None else ("", "")
        rows.append(as_asked(RowScore(answer=text, written=written), row))
        own.append(answer is not None)
    usable = [number for number, row in enumerate(rows) if metric.usable(row)]
    sums = np.asarray(metric.row_sums([rows[number] for number in usable]))
    total = sums[np.asarray([own[number] for number in usable])].sum(axis=0).tolist()
    return metric.values(total if ranks is None else ranks.sum(total))
