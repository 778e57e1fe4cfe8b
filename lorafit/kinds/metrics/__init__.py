"""Metrics of an evaluation. Some read what the task scores; those over answers compare generated text with references.

Every metric is a function of sums over rows, so that one definition serves the corpus, a single row and every resample
of a bootstrap:

    rows --row_sums--> [rows, k] --sum over rows (all, one, or drawn)--> [k] --values--> {"rougeL": .., "rouge1": ..}

A mean has k = 2 (numerator, denominator), BLEU has its n-gram counts and lengths.

A metric that needs more than a row's answer asks for more: `questions` of a row (its prompt in other words, or drawn
again) come back in `RowScore.further`, and for `texts` there are vectors in `RowScore.vectors`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import add
from typing import TYPE_CHECKING, Literal

from lorafit.contracts import ReportTable
from lorafit.kinds.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\u2e80-\u2fdf\u3005-\u3007"
    "\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\ua4cf\ua980-\ua9ff\uaa60-\uaadf\uf900-\ufaff"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
"""Letters of scripts that write no blanks between words, for the brackets of a regular expression: Thai, Lao, Burmese,
Khmer, Tai, Balinese, Javanese, Chinese, Japanese, Yi. Source: Unicode 16, Blocks.txt."""


@dataclass(frozen=True, slots=True)
class Question:
    """One more answer that a metric has written for a row.

    Attributes:
        name: In which way the row is asked again, for people.
        words: What the user says in the place of the row's last words; None: the prompt is as it is.
        draw: Number of a draw, from 1, at `evaluation.draw_temperature`; 0: the answer is made as the row's own.
        alone: Whether it is written in a batch of its own, rather than beside others.
        trap: What an answer must not consist of; empty where there is no such thing.
        filler: Stands before the words, as often as there is room.
        room: What the prompt fills with it: the longest row, or the model's context.
    """

    name: str
    words: str | None = None
    draw: int = 0
    alone: bool = False
    trap: str = ""
    filler: str = ""
    room: Literal["row", "context"] = "row"


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model wrote to a question.

    Attributes:
        question: The question.
        text: The answer without control tokens.
        written: The answer with its control tokens.
        ended: How it ended, as `Answer.ended`.
        before: Of a metric's own prompt: what the rendered prompt holds before its words.
        most_tokens: Longest answer that it could be.
    """

    question: Question
    text: str
    written: str = ""
    ended: str = "stop"
    before: str = ""
    most_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RowScore:
    """What one held-out row contributes; everything a metric may use.

    Attributes:
        sums: What the task scored of the row, by name (`Task.scores`); empty where it was not scored.
        answer: The generated answer, or what the task predicts; None where there is none.
        reference: The answer that the row holds.
        must_contain: Strings that a right answer holds.
        written: The answer with its control tokens, as the model wrote it.
        calls: Names of the tools that the row's answer calls, where the row holds calls apart from text.
        prompt: What the user says last; empty where the prompt ends in something else.
        paraphrases: The same said otherwise.
        further: Answers to a metric's `questions`, in their order, by the metric.
        vectors: Embeddings of length 1 by text, of those that metrics name in `texts`; empty without an encoder.
    """

    sums: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    answer: str | None = None
    reference: str = ""
    must_contain: tuple[str, ...] = ()
    written: str | None = None
    calls: tuple[str, ...] = ()
    prompt: str = ""
    paraphrases: tuple[str, ...] = ()
    further: Mapping[str, tuple[Reply, ...]] = field(default_factory=dict)
    vectors: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def value(self, name: str) -> float:
        """A sum that is one number; 0 where the row was not scored."""
        return self.sums[name][0] if name in self.sums else 0.0

    @property
    def mean_loss(self) -> float | None:
        """The loss of a label; None where the row was not scored."""
        weight = self.value("weight")
        return self.value("loss") / weight if weight else None

    def plus(self, other: RowScore) -> RowScore:
        """This row's score with the sums of another part of the same row, and with what was predicted for it."""
        answer = self.answer if self.answer is not None else other.answer
        if not self.sums:
            return replace(self, sums=other.sums, answer=answer)
        both = {name: tuple(map(add, values, other.sums[name])) for name, values in self.sums.items()}
        return replace(self, sums=both, answer=answer)


class Metric(ABC):
    """One metric; with the attributes as they stand here it reads answers, and needs a reference beside them.

    Attributes:
        name: What its value is called, where it has one; of several the headline's.
        needs: `scores` for those over what the task scores, `answers` for those over generated text, which is a row's
            last answer; `calls` for those over the last turn that calls tools, where a row has one.
        reads: Names of the task's scores that it reads.
        better: Which direction is better.
        percent: Whether its values are shares of 1, shown in per cent.
        condition: What a row needs so that it can be scored, e.g. `a row that names must_contain`.
        companions: Metrics that are scored whenever this one is: what it alone would hide.
        beside: Its other values, which a recipe cannot name: they come with it.
        whole: Its values that are of all answers together and never below 0, so that drawn rows give no interval that
            could hold a 0: they have none, and no verdict.
        settings: How it is computed, so that others can compare.
        while_training: Whether it may be measured while a model is trained; not where it asks for more.
        embeds: What it does with an encoder of sentences: nothing, better than without, or nothing without.
    """

    name: str = ""
    needs: Literal["scores", "answers", "calls"] = "answers"
    reads: tuple[str, ...] = ()
    better: Literal["lower", "higher"] = "higher"
    percent: bool = False
    condition: str = "a row with a reference answer"
    companions: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    settings: str = ""
    while_training: bool = True
    embeds: Literal["no", "may", "must"] = "no"

    def usable(self, row: RowScore) -> bool:
        """Whether this row can be scored (e.g. it names must_contain strings). Rows that cannot are counted."""
        return row.answer is not None and bool(row.reference.strip())

    @abstractmethod
    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """What each usable row adds to the sums, `[rows][k]`."""

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """Values by name from sums over any rows, `[k]`; the first is the headline. Of two sums: their quotient."""
        return {self.name: sums[0] / sums[1]}

    def signature(self) -> str:
        """Which program and settings computed it, so that others can compare."""
        return self.settings

    def questions(self, row: RowScore, draws: int) -> Sequence[Question]:
        """What else a usable row is asked.

        Args:
            row: Without an answer yet.
            draws: `evaluation.draws`.
        """
        return ()

    def probes(self) -> Sequence[Question]:
        """Prompts of its own, each of which becomes a row with one reply; it is scored on these alone."""
        return ()

    def texts(self, row: RowScore) -> Sequence[str]:
        """Texts of a usable row that it compares by their embeddings."""
        return ()

    def tables(self, base: Sequence[RowScore], tuned: Sequence[RowScore]) -> tuple[ReportTable, ...]:
        """What a report shows beside its values, of the usable rows of both models."""
        return ()


class ScoreMean(Metric):
    """A metric over what the task scores, a function of one sum over another.

    Attributes:
        reads: The sums, the one that is divided by last.
    """

    needs = "scores"
    better: Literal["lower", "higher"] = "lower"
    condition = "a row with trained tokens"

    def usable(self, row: RowScore) -> bool:
        """Rows that were scored."""
        return row.value(self.reads[-1]) > 0

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """The sums."""
        return [[row.value(name) for name in self.reads] for row in rows]


class ShareOfRows(Metric):
    """The share of rows of which something is true."""

    percent = True

    @abstractmethod
    def holds(self, row: RowScore) -> bool:
        """Whether it is true of a usable row."""

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """1 or 0, and 1."""
        return [[float(self.holds(row)), 1.0] for row in rows]


metrics: Registry[Metric] = Registry("metric", "lorafit.kinds.metrics")


def with_companions(names: Sequence[str]) -> list[str]:
    """The metrics and those that come with them, each once, in order."""
    return list(dict.fromkeys(each for name in names for each in (name, *metrics.get(name).companions)))


def applies(name: str, scores: Collection[str], *, writes_answers: bool) -> bool:
    """Whether a metric can be asked of a task.

    Args:
        name: A registered metric.
        scores: Names of what the task scores.
        writes_answers: Whether its models write text.
    """
    metric = metrics.get(name)
    return set(metric.reads) <= set(scores) and (metric.needs == "scores" or writes_answers)
