"""Metrics of an evaluation. Those over tokens read sums; those over answers compare generated text with references.

Every metric is a function of sums over rows, so that one definition serves the corpus, a single row and every resample
of a bootstrap:

    rows --row_sums--> [rows, k] --sum over rows (all, one, or drawn)--> [k] --values--> {"rougeL": .., "rouge1": ..}

A mean has k = 2 (numerator, denominator), BLEU has its n-gram counts and lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lorafit.kinds.registry import Registry

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\u2e80-\u2fdf\u3005-\u3007"
    "\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\ua4cf\ua980-\ua9ff\uaa60-\uaadf\uf900-\ufaff"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
"""Letters of scripts that write no blanks between words, for the brackets of a regular expression: Thai, Lao, Burmese,
Khmer, Tai, Balinese, Javanese, Chinese, Japanese, Yi. Source: Unicode 16, Blocks.txt."""


@dataclass(frozen=True, slots=True)
class RowScore:
    """What one held-out row contributes; everything a metric may use.

    Attributes:
        loss_sum: Summed cross-entropy over its trained tokens, in nats.
        tokens: Its trained tokens; 0 where it was not scored.
        correct: Trained tokens whose most likely prediction was right.
        answer: The generated answer; None where nothing was generated.
        reference: The answer that the row holds.
        must_contain: Strings that a right answer holds.
        written: The answer with its control tokens, as the model wrote it.
        calls: Names of the tools that the row's answer calls, where the row holds calls apart from text.
    """

    loss_sum: float
    tokens: int
    correct: int
    answer: str | None = None
    reference: str = ""
    must_contain: tuple[str, ...] = ()
    written: str | None = None
    calls: tuple[str, ...] = ()


class Metric(Protocol):
    """One metric.

    Attributes:
        needs: `loss` for those over trained tokens, `answers` for those over generated text, which is a row's last
            answer; `calls` for those over the last turn that calls tools, where a row has one.
        better: Which direction is better.
        during_training: Whether it may be named in `evaluation.during`.
        percent: Whether its values are shares of 1, shown in per cent.
        condition: What a row needs so that it can be scored, e.g. `a row that names must_contain`.
        companions: Metrics that are scored whenever this one is: what it alone would hide.
    """

    needs: Literal["loss", "answers", "calls"]
    better: Literal["lower", "higher"]
    during_training: bool
    percent: bool
    condition: str
    companions: tuple[str, ...]

    def usable(self, row: RowScore) -> bool:
        """Whether this row can be scored (e.g. it names must_contain strings). Rows that cannot are counted."""

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """What each usable row adds to the sums, `[rows][k]`."""

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """Values by name from sums over any rows, `[k]`; the first is the headline."""

    def signature(self) -> str:
        """Which program and settings computed it, so that others can compare."""


class CorpusScore:
    """A corpus metric of sacrebleu: its statistics of each answer are what is summed over rows.

    Attributes:
        scorer: Gives sacrebleu's metric, made once.
    """

    scorer: Callable[[], Any]

    needs: Literal["loss", "answers", "calls"] = "answers"
    better: Literal["lower", "higher"] = "higher"
    during_training = False
    percent = False
    condition = "a row with a reference answer"
    companions: tuple[str, ...] = ()

    def usable(self, row: RowScore) -> bool:
        """Rows that hold a reference and got an answer."""
        return row.answer is not None and bool(row.reference.strip())

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """sacrebleu's counts of n-grams and lengths."""
        answers, references = [row.answer or "" for row in rows], [row.reference for row in rows]
        return [list(map(float, sums)) for sums in self.scorer()._extract_corpus_statistics(answers, [references])]

    def signature(self) -> str:
        """sacrebleu's own signature."""
        self.scorer().num_refs = 1
        return str(self.scorer().get_signature())


metrics: Registry[Metric] = Registry("metric", "lorafit.kinds.metrics")


def with_companions(names: Sequence[str]) -> list[str]:
    """The metrics and those that come with them, each once, in order."""
    return list(dict.fromkeys(each for name in names for each in (name, *metrics.get(name).companions)))
