"""Mean over pairs of beta times what the chosen answer gained over the reference beyond what the rejected one did."""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.kinds.metrics import ScoreMean, metrics


@metrics.register("reward_margin")
class RewardMargin(ScoreMean):
    """How far the two answers were moved apart, in nats times beta; 0 of the reference itself."""

    reads = ("margin", "weight")
    better = "higher"
    condition = "a pair of answers"
    settings = "mean of beta times the difference of both log-ratios"

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The mean."""
        return {"reward_margin": sums[0] / sums[1]}
