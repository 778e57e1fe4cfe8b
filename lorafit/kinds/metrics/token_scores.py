"""Metrics over what a task scores of its labels.

    loss             mean loss of a label: of a causal language model `sum of -ln p(token) / trained tokens`, in nats
    perplexity       over trained tokens: `exp(mean cross-entropy)`
    token_accuracy   share of trained tokens that the model would have chosen itself, given the right tokens before each

Source: Jelinek, Mercer, Bahl and Baker (1977), "Perplexity, a measure of the difficulty of speech recognition tasks".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorafit.kinds.metrics import ScoreMean, metrics

LARGEST_EXPONENT = 700.0  # exp overflows a double above 709; a model that bad needs no more digits


@metrics.register("loss")
class Loss(ScoreMean):
    """What is trained: mean negative log-likelihood of a trained token, weighted by tokens, not by rows."""

    name = "loss"
    reads = ("loss", "weight")
    settings = "nats per label: a trained token, a class or a pair"


@metrics.register("perplexity")
class Perplexity(ScoreMean):
    """How many equally likely tokens the model hesitates between, on average."""

    reads = ("loss", "tokens")
    settings = "exp of nats per trained token"

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """exp of the mean."""
        return {"perplexity": math.exp(min(sums[0] / sums[1], LARGEST_EXPONENT))}


@metrics.register("token_accuracy")
class TokenAccuracy(ScoreMean):
    """Top-1 accuracy over trained tokens, teacher-forced."""

    name = "token_accuracy"
    reads = ("correct", "tokens")
    better = "higher"
    percent = True
    settings = "top-1 over trained tokens, right prefix given"
