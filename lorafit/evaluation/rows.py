"""Held-out rows with both models' scores: joined by file and line, compared by metric, and the worst of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING

from lorafit.answering.generate import Answer
from lorafit.console.wording import counted
from lorafit.contracts import JsonObject, ReportTable
from lorafit.evaluation.further import Asking, Replies, as_asked
from lorafit.evaluation.statistics import Comparison, compare
from lorafit.kinds.metrics import Metric, Reply, RowScore, metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafit.contracts import Example, Examples, GenerationRow, Reporter, ShownSequence
    from lorafit.objective import TrainedTask


WORST_ROWS = 10
OwnRows = Mapping[str, "Sequence[Row]"]
"""Rows of metrics' own prompts, by metric."""


_NOT_SCORED = RowScore()


@dataclass(frozen=True, slots=True)
class Row:
    """One held-out row with both models' scores.

    Attributes:
        prompt: What the model got, as text; empty where nothing was generated for the row.
        images: Files of the prompt's images, or of the whole row where nothing was generated for it.
        call: The same row as it was asked at an earlier turn, the last one that calls tools; None where it was not.
    """

    file: str
    line: int
    prompt: str = ""
    base: RowScore = _NOT_SCORED
    tuned: RowScore = _NOT_SCORED
    call: Row | None = None
    images: tuple[str, ...] = ()

    def asked_for(self, needs: str) -> Row:
        """The row as a metric reads it, by what that needs: `calls` means the call, where one was asked for."""
        return self.call if needs == "calls" and self.call is not None else self

    def to_json(self) -> JsonObject:
        """The row for `report.jsonl`; of an earlier turn what was asked: the losses stand here already."""
        call: JsonObject = {}
        if (row := self.call) is not None:
            answers = {"base_answer": row.base.answer, "tuned_answer": row.tuned.answer}
            call = {"call": {"prompt": row.prompt, "reference": row.tuned.reference, **answers}}
        return {
            "file": self.file,
            "line": self.line,
            "prompt": self.prompt,
            **({"images": list(self.images)} if self.images else {}),
            "reference": self.tuned.reference,
            "must_contain": list(self.tuned.must_contain),
            "base": _side(self.base),
            "tuned": _side(self.tuned),
            **call,
        }


@dataclass(frozen=True, slots=True)
class WorstRow:
    """A row that the tuned model does badly on.

    Attributes:
        row: The row, prompt and reference filled in.
        name: The value it is ranked by.
        base: That value of the base model on this row.
        tuned: That value of the tuned model on this row.
        answers: Of a row of several sequences (a pair) what is scored in each, by its name; else empty.
    """

    row: Row
    name: str
    base: float
    tuned: float
    answers: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> JsonObject:
        """The row and what it is ranked by."""
        ranked = {"ranked_by": self.name, "base_score": self.base, "tuned_score": self.tuned}
        return {**self.row.to_json(), **dict(self.answers), **ranked}


@dataclass(frozen=True, slots=True)
class Unscored:
    """Rows that a metric could not score.

    Attributes:
        metric: The metric.
        rows: How many it could not score.
        of: Rows there were.
        condition: What a row needs.
    """

    metric: str
    rows: int
    of: int
    condition: str

    @property
    def sentence(self) -> str:
        """For people."""
        if self.rows == self.of:
            return f"{self.metric}: does not apply, none of {counted(self.of, 'row')} is {self.condition}"
        return f"{self.metric}: {self.rows} of {counted(self.of, 'row')} left out, it needs {self.condition}"


def join_rows(
    examples: Examples,
    base_losses: Sequence[RowScore],
    tuned_losses: Sequence[RowScore],
    asked: Sequence[GenerationRow] = (),
    base_answers: Sequence[Answer] = (),
    tuned_answers: Sequence[Answer] = (),
    base_further: Sequence[Replies] | None = None,
    tuned_further: Sequence[Replies] | None = None,
) -> tuple[Row, ...]:
    """One Row a source row. Examples that were split from one row are added up: rows are what a bootstrap may draw."""
    base_replies, tuned_replies = (
        further[: len(asked)] if further else [{}] * len(asked) for further in (base_further, tuned_further)
    )
    joined: dict[tuple[str, int], Row] = {}
    for index, (base, tuned) in enumerate(zip(base_losses, tuned_losses, strict=True)):
        file, line = place_of(examples[index])
        known = joined.get((file, line), Row(file, line))
        joined[file, line] = replace(known, base=known.base.plus(base), tuned=known.tuned.plus(tuned))
    of_base, of_tuned = zip(base_answers, base_replies, strict=True), zip(tuned_answers, tuned_replies, strict=True)
    for question, base_answered, tuned_answered in zip(asked, of_base, of_tuned, strict=True):
        known = joined.get((question.file, question.line), Row(question.file, question.line))
        base, tuned = (
            replace(
                as_asked(side, question),
                answer=answer.written if question.calls else answer.text,  # as the reference: calls are control tokens
                written=answer.written,
                further=further,
            )
            for side, (answer, further) in ((known.base, base_answered), (known.tuned, tuned_answered))
        )
        images = tuple(one.file for one in question.pictures)
        here = replace(known, prompt=question.prompt_text, base=base, tuned=tuned, images=images)
        joined[question.file, question.line] = replace(known, call=here) if question.is_inner else here
    return tuple(joined.values())


def probe_rows(base: Replies, tuned: Replies) -> dict[str, tuple[Row, ...]]:
    """The rows of metrics' own prompts, by metric."""
    return {
        name: tuple(
            Row("", number, base=_probed(name, one), tuned=_probed(name, other))
            for number, (one, other) in enumerate(zip(replies, tuned[name], strict=True), start=1)
        )
        for name, replies in base.items()
    }


def _probed(name: str, reply: Reply) -> RowScore:
    return RowScore(
        answer=reply.text, written=reply.written, prompt=reply.question.words or "", further={name: (reply,)}
    )


def compare_rows(
    rows: Sequence[Row], metric_names: Sequence[str], *, seed: int, own: OwnRows | None = None
) -> tuple[tuple[Comparison, ...], tuple[Unscored, ...]]:
    """A comparison for each value of each metric over the rows it can score, and what it could not score.

    `own`: rows of metrics' own prompts, which they are scored on instead.
    """
    comparisons: list[Comparison] = []
    unscored: list[Unscored] = []
    for name in dict.fromkeys(metric_names):
        metric, read = metrics.get(name), (own or {}).get(name, rows)
        usable = usable_rows(read, metric)
        if len(usable) < len(read):
            unscored.append(Unscored(name, len(read) - len(usable), len(read), metric.condition))
        if usable:
            base, tuned = [row.base for row in usable], [row.tuned for row in usable]
            comparisons += compare(name, metric, base, tuned, seed=seed)
    return tuple(comparisons), tuple(unscored)


def usable_rows(rows: Sequence[Row], metric: Metric) -> list[Row]:
    """The rows that a metric can score of both models, as it reads them."""
    read = [row.asked_for(metric.needs) for row in rows]
    return [row for row in read if metric.usable(row.base) and metric.usable(row.tuned)]


def with_vectors(
    rows: Sequence[Row], metric_names: Sequence[str], asking: Asking | None, reporter: Reporter
) -> tuple[Row, ...]:
    """The rows with the embeddings that metrics compare texts by; as they are without an encoder."""
    read = [metric for metric in map(metrics.get, dict.fromkeys(metric_names)) if metric.embeds != "no"]
    texts = [
        text
        for metric in read
        for row in usable_rows(rows, metric)
        for side in (row.base, row.tuned)
        for text in metric.texts(side)
    ]
    if asking is None or asking.encoder is None or not texts:
        return tuple(rows)
    vectors = asking.encoder.embed(texts, reporter)
    return tuple(
        replace(row, base=replace(row.base, vectors=vectors), tuned=replace(row.tuned, vectors=vectors)) for row in rows
    )


def show_metrics(rows: Sequence[Row], metric_names: Sequence[str], own: OwnRows) -> tuple[ReportTable, ...]:
    """What metrics show beside their values, of the rows or of their own prompts."""
    found = list[ReportTable]()
    for name in dict.fromkeys(metric_names):
        metric = metrics.get(name)
        if usable := usable_rows(own.get(name, rows), metric):
            found += metric.tables([row.base for row in usable], [row.tuned for row in usable])
    return tuple(found)


def find_worst(rows: Sequence[Row], comparisons: Sequence[Comparison]) -> list[WorstRow]:
    """The rows that the tuned model does worst on, by the first metric over answers, else by the loss of a token.

    Among equals the row with the higher loss comes first.
    """
    names = [line.metric for line in comparisons]
    answering = (name for name in names if metrics.get(name).needs != "scores" and not metrics.get(name).probes())
    name = next(answering, "loss")
    metric = metrics.get(name)
    sign = 1.0 if metric.better == "higher" else -1.0
    found: list[tuple[float, float, WorstRow]] = []
    usable = usable_rows(rows, metric)
    sides = [metric.row_sums([row.base for row in usable]), metric.row_sums([row.tuned for row in usable])]
    for row, base_sums, tuned_sums in zip(usable, *sides, strict=True):
        base, tuned = (next(iter(metric.values(sums).items())) for sums in (base_sums, tuned_sums))
        loss = row.tuned.mean_loss
        second = -math.inf if loss is None else -loss
        found.append((sign * tuned[1], second, WorstRow(row, tuned[0], base[1], tuned[1])))
    return [worst for *_, worst in sorted(found, key=lambda entry: entry[:2])[:WORST_ROWS]]


def fill_text(
    worst: Sequence[WorstRow], examples: Examples, task: TrainedTask, tokenizer: PreTrainedTokenizerBase
) -> tuple[WorstRow, ...]:
    """The same rows with prompt and reference as text, decoded from tokens where nothing was generated for a row."""
    wanted = {(w.row.file, w.row.line) for w in worst}
    first: dict[tuple[str, int], tuple[ShownSequence, ...]] = {}
    for index in range(len(examples)):
        if len(first) == len(wanted):
            break
        example = examples[index]
        if place_of(example) in wanted - first.keys():
            first[place_of(example)] = task.show(example)
    filled = []
    for entry in worst:
        row, shown = entry.row, first.get((entry.row.file, entry.row.line), ())
        asked = ""
        if any(any(each.trained) for each in shown[1:]) and not any(shown[0].trained):  # what an encoder reads
            asked, shown = tokenizer.decode(shown[0].input_ids), shown[1:]
        shown = _tell_answers(shown)
        if shown and not (row.prompt or row.tuned.reference):
            prompt, reference = _decode(shown[0], tokenizer)
            base, tuned = (replace(side, reference=reference) for side in (row.base, row.tuned))
            images = tuple(one.file for one in shown[0].pictures)
            row = replace(row, prompt=asked or prompt, base=base, tuned=tuned, images=images)
        answers = tuple((each.name, _decode(each, tokenizer)[1]) for each in shown) if len(shown) > 1 else ()
        filled.append(replace(entry, row=row, answers=answers))
    return tuple(filled)


def place_of(example: Example) -> tuple[str, int]:
    """File and line, which name a source row."""
    return example.file, example.line


def _shown(value: float) -> float:
    """A count as the whole number that it is."""
    return int(value) if value == int(value) else value


def _reply(reply: Reply) -> JsonObject:
    words = {} if reply.question.words is None else {"words": reply.question.words}
    return {"asked": reply.question.name, **words, "answer": reply.text}


def _side(score: RowScore) -> JsonObject:
    sums = {name: values for name, values in score.sums.items() if name not in ("loss", "weight")}
    shown = {name: _shown(values[0]) if len(values) == 1 else list(values) for name, values in sums.items()}
    further = {name: [_reply(reply) for reply in replies] for name, replies in score.further.items()}
    return {"loss": score.mean_loss, **shown, "answer": score.answer, **({"further": further} if further else {})}


def _tell_answers(shown: tuple[ShownSequence, ...]) -> tuple[ShownSequence, ...]:
    """The sides of a row; of one without trained tokens, what stands behind that with which all begin is its answer."""
    if len(shown) < 2:
        return shown
    sides = [each.input_ids for each in shown]
    begin = sum(1 for _ in takewhile(lambda tokens: len({*tokens}) == 1, zip(*sides, strict=False)))
    begin = min([begin, *(each.trained.index(1) for each in shown if 1 in each.trained)])
    flags = ([int(place >= begin) for place in range(len(each.input_ids))] for each in shown)
    return tuple(
        each if any(each.trained) else replace(each, trained=own) for each, own in zip(shown, flags, strict=True)
    )


def _decode(sequence: ShownSequence, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Text before the first trained token, and text of the trained ones.

    Of a text that is labelled the whole of it and its label; of a lone one without loss all of it as an answer.
    """
    if sequence.label:
        return tokenizer.decode(sequence.input_ids), sequence.label
    if not any(sequence.trained):
        return "", tokenizer.decode(sequence.input_ids)
    pairs = list(zip(sequence.input_ids, sequence.trained, strict=True))
    first = next((place for place, (_, flag) in enumerate(pairs) if flag), len(pairs))
    prompt = tokenizer.decode([token for token, _ in pairs[:first]])
    return prompt, tokenizer.decode([token for token, flag in pairs if flag])
