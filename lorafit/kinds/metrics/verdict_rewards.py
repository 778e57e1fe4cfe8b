"""Mean rewards of answers that come one by one with a verdict, and how far the two kinds are apart.

A reward is beta times the nats that an answer gained over the reference: 0 of the reference itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.kinds.metrics import RowScore, ScoreMean, metrics

_SETTINGS = "beta times the nats that an answer gained over the reference"


class _RewardOfKind(ScoreMean):
    """The mean reward of the answers of one verdict; 0 where there is none."""

    reads = ("reward", "desirable", "weight")
    condition = "an answer with a verdict"
    settings = _SETTINGS
    wanted: float

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """The reward and 1 of answers of the verdict, nothing of others."""
        counts = [float(row.value("desirable") == self.wanted) for row in rows]
        return [[row.value("reward") * count, count] for row, count in zip(rows, counts, strict=True)]

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The mean."""
        return {self.name: sums[0] / max(sums[1], 1.0)}


@metrics.register("desirable_reward")
class DesirableReward(_RewardOfKind):
    """Of desirable answers."""

    name = "desirable_reward"
    better = "higher"
    wanted = 1.0


@metrics.register("undesirable_reward")
class UndesirableReward(_RewardOfKind):
    """Of undesirable answers."""

    name = "undesirable_reward"
    wanted = 0.0


@metrics.register("desirable_margin")
class DesirableMargin(ScoreMean):
    """The difference of both means."""

    reads = ("reward", "desirable", "weight")
    better = "higher"
    condition = "an answer with a verdict"
    companions = ("desirable_reward", "undesirable_reward")
    settings = f"difference of the mean rewards of both kinds; {_SETTINGS}"

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """Reward and number of desirable answers, then of undesirable ones."""
        sums = []
        for row in rows:
            reward, is_good = row.value("reward"), row.value("desirable")
            sums.append([reward * is_good, is_good, reward * (1.0 - is_good), 1.0 - is_good])
        return sums

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The difference."""
        return {"desirable_margin": sums[0] / max(sums[1], 1.0) - sums[2] / max(sums[3], 1.0)}
