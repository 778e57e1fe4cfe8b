"""Perplexity over trained tokens: `exp(mean cross-entropy)`.

Source: Jelinek, Mercer, Bahl and Baker (1977), "Perplexity, a measure of the difficulty of speech recognition tasks".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorafit.kinds.metrics import ScoreMean, metrics

LARGEST_EXPONENT = 700.0  # exp overflows a double above 709; a model that bad needs no more digits


@metrics.register("perplexity")
class Perplexity(ScoreMean):
    """How many equally likely tokens the model hesitates between, on average."""

    reads = ("loss", "tokens")
    settings = "exp of nats per trained token"

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """exp of the mean."""
        return {"perplexity": math.exp(min(sums[0] / sums[1], LARGEST_EXPONENT))}
