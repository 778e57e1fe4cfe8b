"""Metrics of an evaluation. Those over tokens read sums; those over answers compare generated text with references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from lorafit.registry import Registry


@dataclass(frozen=True, slots=True)
class RowScore:
    """What one held-out row contributes; everything a metric may use.

    Attributes:
        loss_sum: Summed cross-entropy over its trained tokens, in nats.
        tokens: Its trained tokens.
        correct: Trained tokens whose most likely prediction was right.
        answer: The generated answer; None where nothing was generated.
        reference: The answer that the row holds.
        must_contain: Strings that a right answer holds.
    """

    loss_sum: float
    tokens: int
    correct: int
    answer: str | None = None
    reference: str = ""
    must_contain: tuple[str, ...] = ()


class Metric(Protocol):
    """One metric.

    Attributes:
        needs: `loss` for those over trained tokens, `answers` for those over generated text.
        better: Which direction is better.
        during_training: Whether it may be named in `evaluation.during`.
        per_row: Whether the corpus value is the mean of row values (else it is recomputed over the resampled corpus).
    """

    needs: Literal["loss", "answers"]
    better: Literal["lower", "higher"]
    during_training: bool

    def applies(self, rows: Sequence[RowScore]) -> bool:
        """Whether these rows can be scored (e.g. some row names must_contain strings)."""

    def score(self, rows: Sequence[RowScore]) -> dict[str, float]:
        """Corpus values by name, e.g. `{"rouge1": .., "rougeL": ..}`; the first is the headline."""

    def row_values(self, rows: Sequence[RowScore]) -> list[tuple[float, float]] | None:
        """For each row the headline's (numerator, denominator), so that a bootstrap can resample rows cheaply and the
        worst rows can be listed; the corpus value is f(sum of numerators / sum of denominators). None if it has no such form."""

    def finish(self, mean: float) -> float:
        """f above: identity for means, exp for perplexity."""


metrics: Registry[Metric] = Registry("metric", "lorafit.kinds.metrics")
