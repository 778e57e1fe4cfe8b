"""Mean cross-entropy over trained tokens, in nats: `sum of -ln p(token) / tokens`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lorafit.kinds.metrics import RowScore, metrics


@metrics.register("loss")
class Loss:
    """Mean negative log-likelihood of a trained token, weighted by tokens, not by rows."""

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
        """The mean."""
        return {"loss": sums[0] / sums[1]}

    def signature(self) -> str:
        """Unit and mean."""
        return "nats per trained token"
