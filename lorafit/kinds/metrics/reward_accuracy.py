"""Share of pairs of which the chosen answer gained more log-probability over the reference than the rejected one.

Source: Rafailov et al. 2023, Direct Preference Optimization (https://arxiv.org/abs/2305.18290): its implicit reward is
beta times what an answer gained.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.kinds.metrics import ScoreMean, metrics


@metrics.register("reward_accuracy")
class RewardAccuracy(ScoreMean):
    """A tie counts half: the reference itself prefers neither, and has 50 %."""

    reads = ("preferred", "weight")
    better = "higher"
    percent = True
    condition = "a pair of answers"
    settings = "chosen above rejected by the gain over the reference; a tie counts half"

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The share."""
        return {"reward_accuracy": sums[0] / sums[1]}
