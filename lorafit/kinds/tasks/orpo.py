"""Odds ratio preference optimisation: the chosen answer is learnt as in supervised tuning, the rejected one is made
less likely beside it, and no reference is needed.

    p(answer) = exp(mean of ln p over the answer's tokens)          odds = p / (1 - p)
    loss      = -ln p(chosen) - weight * ln sigmoid(ln (odds(chosen) / odds(rejected)))     the mean over pairs

Source: Hong et al. 2024, ORPO: Monolithic Preference Optimization without Reference Model
(https://arxiv.org/abs/2403.07691), equations 3, 4, 6 and 7.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lorafit.kinds.tasks import TaskSection, tasks
from lorafit.kinds.tasks._pairs import LikelihoodPairs, answer_lengths

if TYPE_CHECKING:
    import torch

    from lorafit.contracts import Batch

_TIE_NATS = 1e-6
"""Log-odds that differ by less are a tie: rounding alone may part them so far."""


class OrpoSection(TaskSection):
    """Odds ratio preference optimisation."""

    kind: Literal["orpo"] = "orpo"
    """Odds ratio preference optimisation."""
    odds_weight: float = Field(default=0.1, gt=0.0, le=100.0)
    """What the odds ratio counts beside the chosen answer's own loss: lambda of the paper."""


@tasks.register(OrpoSection)
class Orpo(LikelihoodPairs[OrpoSection]):
    """An answer's reward is its log-odds: how much likelier than not a token of it is, in nats."""

    def tie(self) -> float:
        return _TIE_NATS

    def compare(self, log_probs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Each pair's loss and the logarithm of its odds ratio."""
        import torch
        from torch.nn import functional

        means = log_probs / answer_lengths(batch)
        # ln (1 - p): -expm1 keeps it finite and exact where p is next to 1; a p that rounds to 1 has no odds.
        surprise = torch.log(-torch.expm1(means.clamp(max=-torch.finfo(means.dtype).eps)))
        log_odds = means - surprise
        margins = log_odds[:, 0] - log_odds[:, 1]
        return -means[:, 0] - self.section.odds_weight * functional.logsigmoid(margins), margins
