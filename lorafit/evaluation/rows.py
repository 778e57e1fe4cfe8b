"""Rows of an evaluation: losses and answers joined by file and line, compared by metric, the worst ones found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lorafit.evaluation.evaluation import Row, Unscored, WorstRow
from lorafit.evaluation.statistics import Comparison, compare
from lorafit.kinds.metrics import RowScore, metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafit.answering.generate import Answer
    from lorafit.contracts import Example, Examples, GenerationRow
    from lorafit.objective import TrainedTask

WORST_ROWS = 10


def join_rows(
    examples: Examples,
    base_losses: Sequence[RowScore],
    tuned_losses: Sequence[RowScore],
    asked: Sequence[GenerationRow] = (),
    base_answers: Sequence[Answer] = (),
    tuned_answers: Sequence[Answer] = (),
) -> tuple[Row, ...]:
    """One Row a source row. Examples that were split from one row are added up: rows are what a bootstrap may draw."""
    joined: dict[tuple[str, int], Row] = {}
    nothing = RowScore()
    for index, (base, tuned) in enumerate(zip(base_losses, tuned_losses, strict=True)):
        file, line = place_of(examples[index])
        known = joined.get((file, line), Row(file, line, "", nothing, nothing))
        joined[file, line] = replace(known, base=known.base.plus(base), tuned=known.tuned.plus(tuned))
    for question, base_answer, tuned_answer in zip(asked, base_answers, tuned_answers, strict=True):
        known = joined.get((question.file, question.line), Row(question.file, question.line, "", nothing, nothing))
        base, tuned = (
            replace(
                side,
                answer=answer.written if question.calls else answer.text,  # as the reference: calls are control tokens
                reference=question.reference,
                must_contain=question.must_contain,
                written=answer.written,
                calls=question.calls,
            )
            for side, answer in ((known.base, base_answer), (known.tuned, tuned_answer))
        )
        here = replace(known, prompt=question.prompt_text, base=base, tuned=tuned)
        joined[question.file, question.line] = replace(known, call=here) if question.is_inner else here
    return tuple(joined.values())


def compare_rows(
    rows: Sequence[Row], metric_names: Sequence[str], *, seed: int
) -> tuple[tuple[Comparison, ...], tuple[Unscored, ...]]:
    """A comparison for each value of each metric over the rows it can score, and what it could not score."""
    comparisons: list[Comparison] = []
    unscored: list[Unscored] = []
    for name in dict.fromkeys(metric_names):
        metric = metrics.get(name)
        read = [row.asked_for(metric.needs) for row in rows]
        usable = [row for row in read if metric.usable(row.base) and metric.usable(row.tuned)]
        if len(usable) < len(rows):
            unscored.append(Unscored(name, len(rows) - len(usable), len(rows), metric.condition))
        if usable:
            base, tuned = [row.base for row in usable], [row.tuned for row in usable]
            comparisons += compare(name, metric, base, tuned, seed=seed)
    return tuple(comparisons), tuple(unscored)


def find_worst(rows: Sequence[Row], comparisons: Sequence[Comparison], count: int = WORST_ROWS) -> list[WorstRow]:
    """The rows that the tuned model does worst on, by the first metric over answers, else by the loss of a token.

    Among equals the row with the higher loss comes first.
    """
    names = [line.metric for line in comparisons]
    name = next((name for name in names if metrics.get(name).needs != "scores"), "loss")
    metric = metrics.get(name)
    sign = 1.0 if metric.better == "higher" else -1.0
    found: list[tuple[float, float, WorstRow]] = []
    for row in (row.asked_for(metric.needs) for row in rows):
        if not (metric.usable(row.base) and metric.usable(row.tuned)):
            continue
        base, tuned = (next(iter(metric.values(metric.row_sums([side])[0]).items())) for side in (row.base, row.tuned))
        loss = row.tuned.mean_loss
        second = -math.inf if loss is None else -loss
        found.append((sign * tuned[1], second, WorstRow(row, tuned[0], base[1], tuned[1])))
    return [worst for *_, worst in sorted(found, key=lambda entry: entry[:2])[:count]]


def fill_text(
    worst: Sequence[WorstRow], examples: Examples, task: TrainedTask, tokenizer: PreTrainedTokenizerBase
) -> tuple[WorstRow, ...]:
    """The same rows with prompt and reference as text, decoded from tokens where nothing was generated for a row."""
    wanted = {(w.row.file, w.row.line) for w in worst if not (w.row.prompt or w.row.tuned.reference)}
    texts: dict[tuple[str, int], tuple[str, str]] = {}
    for index in range(len(examples) if wanted else 0):
        example = examples[index]
        if place_of(example) in wanted - texts.keys():
            texts[place_of(example)] = _decode(example, task, tokenizer)
    filled = []
    for entry in worst:
        prompt, reference = texts.get((entry.row.file, entry.row.line), (entry.row.prompt, entry.row.tuned.reference))
        base, tuned = (replace(side, reference=reference) for side in (entry.row.base, entry.row.tuned))
        filled.append(replace(entry, row=replace(entry.row, prompt=prompt, base=base, tuned=tuned)))
    return tuple(filled)


def place_of(example: Example) -> tuple[str, int]:
    """File and line, which name a source row."""
    return example.file, example.line


def _decode(example: Example, task: TrainedTask, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Text before the first trained token, and text of the trained tokens, or the row's label."""
    sequence = task.show(example)[0]
    pairs = list(zip(sequence.input_ids, sequence.trained, strict=True))
    first = next((place for place, (_, flag) in enumerate(pairs) if flag), len(pairs))
    prompt = tokenizer.decode([token for token, _ in pairs[:first]])
    return prompt, sequence.label or tokenizer.decode([token for token, flag in pairs if flag])
