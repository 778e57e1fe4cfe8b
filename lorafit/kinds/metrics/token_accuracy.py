"""Share of trained tokens that the model would have chosen itself, each given the right tokens before it."""

from __future__ import annotations

from lorafit.kinds.metrics import ScoreMean, metrics


@metrics.register("token_accuracy")
class TokenAccuracy(ScoreMean):
    """Top-1 accuracy over trained tokens, teacher-forced."""

    name = "token_accuracy"
    reads = ("correct", "tokens")
    better = "higher"
    percent = True
    settings = "top-1 over trained tokens, right prefix given"
