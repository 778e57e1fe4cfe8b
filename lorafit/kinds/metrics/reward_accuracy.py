"""Share of pairs whose chosen answer has more reward than the rejected one. What a reward is, the task says: DPO's is
what an answer gained over the reference, ORPO's the odds of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.kinds.metrics import ScoreMean, metrics


@metrics.register("reward_accuracy")
class RewardAccuracy(ScoreMean):
    """A tie counts half: DPO's reference itself prefers neither, and has 50 %."""

    reads = ("preferred", "weight")
    better = "higher"
    percent = True
    condition = "a pair of answers"
    settings = "chosen above rejected by the task's reward; a tie counts half"

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The share."""
        return {"reward_accuracy": sums[0] / sums[1]}
