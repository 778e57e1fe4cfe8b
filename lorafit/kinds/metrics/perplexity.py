"""Perplexity over trained tokens: `exp(mean cross-entropy)`.

Source: Jelinek, Mercer, Bahl and Baker (1977), "Perplexity, a measure of the difficulty of speech recognition tasks".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from lorafit.kinds.metrics import RowScore, metrics

LARGEST_EXPONENT = 700.0  # exp overflows a double above 709; a model that bad needs no more digits


@metrics.register("perplexity")
class Perplexity:
    """How many equally likely tokens the model hesitates between, on average."""

    needs: Literal["loss", "answers", "calls"] = "loss"
    better: Literal["lower", "higher"] = "lower"
    during_training = True
    percent = False
    condition = "a row with trained tokens"
    companions: tuple[str, ...] = ()

    def usable(self, row: RowScore) -> bool:
        """Rows with at least one trained token."""
        return row.tokens > 0

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """Summed loss and trained tokens."""
        return [[row.loss_sum, row.tokens] for row in rows]

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """exp of the mean."""
        return {"perplexity": math.exp(min(sums[0] / sums[1], LARGEST_EXPONENT))}

    def signature(self) -> str:
        """Unit of the exponent."""
        return "exp of nats per trained token"
