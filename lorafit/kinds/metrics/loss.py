"""Mean loss of a label: of a causal language model `sum of -ln p(token) / trained tokens`, in nats."""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.kinds.metrics import ScoreMean, metrics


@metrics.register("loss")
class Loss(ScoreMean):
    """What is trained: mean negative log-likelihood of a trained token, weighted by tokens, not by rows."""

    reads = ("loss", "weight")
    settings = "nats per label: a trained token, a class or a pair"

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The mean."""
        return {"loss": sums[0] / sums[1]}
