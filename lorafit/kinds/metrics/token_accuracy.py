"""Share of trained tokens that the model would have chosen itself, each given the right tokens before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lorafit.kinds.metrics import RowScore, metrics


@metrics.register("token_accuracy")
class TokenAccuracy:
    """Top-1 accuracy over trained tokens, teacher-forced."""

    needs: Literal["loss", "answers", "calls"] = "loss"
    better: Literal["lower", "higher"] = "higher"
    during_training = True
    percent = True
    condition = "a row with trained tokens"
    companions: tuple[str, ...] = ()

    def usable(self, row: RowScore) -> bool:
        """Rows with at least one trained token."""
        return row.tokens > 0

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """Right tokens and trained tokens."""
        return [[row.correct, row.tokens] for row in rows]

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The share."""
        return {"token_accuracy": sums[0] / sums[1]}

    def signature(self) -> str:
        """How it is counted."""
        return "top-1 over trained tokens, right prefix given"
