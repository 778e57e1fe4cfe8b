"""Share of trained tokens that the model would have chosen itself, each given the right tokens before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lorafit.kinds.metrics import ScoreMean, metrics


@metrics.register("token_accuracy")
class TokenAccuracy(ScoreMean):
    """Top-1 accuracy over trained tokens, teacher-forced."""

    reads: tuple[str, ...] = ("correct", "tokens")
    condition = "a row with trained tokens"
    better: Literal["lower", "higher"] = "higher"
    percent = True

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The share."""
        return {"token_accuracy": sums[0] / sums[1]}

    def signature(self) -> str:
        """How it is counted."""
        return "top-1 over trained tokens, right prefix given"
