"""Mean loss of a label: of a causal language model `sum of -ln p(token) / trained tokens`, in nats."""

from __future__ import annotations

from lorafit.kinds.metrics import ScoreMean, metrics


@metrics.register("loss")
class Loss(ScoreMean):
    """What is trained: mean negative log-likelihood of a trained token, weighted by tokens, not by rows."""

    name = "loss"
    reads = ("loss", "weight")
    settings = "nats per label: a trained token, a class or a pair"
