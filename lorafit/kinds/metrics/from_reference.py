"""How far a model has gone from its reference, told from held-out answers.

    ref_log_ratio     sum over answers of (ln p(answer) - ln p_ref(answer)) / their tokens
    reference_point   max(0, mean over rows of ln p(y'|x) - ln p_ref(y'|x)), y' an answer to another prompt: KTO's z0

Of answers that the model had sampled itself the first would be the k1 estimate of the KL divergence to the reference, a
token. These come from the data: the value may be negative, which a divergence never is, and says nothing of what else
the model would say. Both are 0 of the reference itself.

Source of k1: Schulman 2020, Approximating KL Divergence (http://joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.kinds.metrics import ScoreMean, metrics


@metrics.register("ref_log_ratio")
class RefLogRatio(ScoreMean):
    """Nats a token; pairs count with both of their answers."""

    name = "ref_log_ratio"
    reads = ("log_ratio", "answer_tokens")
    condition = "a row with a reference"
    settings = "k1 over held-out answers, not over samples of the model; nats per answer token"


@metrics.register("reference_point")
class ReferencePoint(ScoreMean):
    """Nats an answer, of the whole held-out set."""

    reads = ("mismatched", "weight")
    condition = "a row with an answer to another prompt"
    settings = "mean nats that answers to other prompts gained over the reference, at least 0"

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The mean, or 0."""
        return {"reference_point": max(0.0, sums[0] / sums[1])}
