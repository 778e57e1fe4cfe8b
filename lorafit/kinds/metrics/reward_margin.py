"""Mean over pairs of how far the chosen answer's reward is above the rejected one's; the task says what a reward is."""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.kinds.metrics import ScoreMean, metrics


@metrics.register("reward_margin")
class RewardMargin(ScoreMean):
    """DPO: beta times the difference of both gains over the reference in nats, 0 of the reference itself; ORPO: the
    logarithm of the odds ratio."""

    reads = ("margin", "weight")
    better = "higher"
    condition = "a pair of answers"
    settings = "mean of the difference of both rewards of the task"

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The mean."""
        return {"reward_margin": sums[0] / sums[1]}
