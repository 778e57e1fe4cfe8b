"""LoRA+: LoRA whose B learns at a multiple of A's learning rate; what is saved is a plain LoRA adapter.

    A' = A - eta G_A        B' = B - ratio * eta G_B        eta: the schedule's rate; G: the optimizer's direction

Weight decay is the optimizer section's for both; as AdamW decays by rate times decay, B decays `ratio` times as fast.
Source: Hayou et al. 2024, LoRA+: Efficient Low Rank Adaptation of Large Models (https://arxiv.org/abs/2402.12354),
section 4; the ratio of 16 is its authors' default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from lorafit.kinds.adapters import adapters
from lorafit.kinds.adapters._low_rank import LowRankSection, PlainLowRank


class LoraPlusSection(LowRankSection):
    """Low-rank adapters beside frozen linears, whose two matrices learn at different rates."""

    kind: Literal["lora_plus"] = "lora_plus"
    """LoRA+."""
    rate_ratio: float = Field(default=16.0, ge=1.0, le=1e4)
    """Learning rate of B over that of A, which is `training.learning_rate`; a lower one than LoRA's suits it."""


@adapters.register(LoraPlusSection)
class LoraPlus(PlainLowRank[LoraPlusSection]):
    """PEFT's LoRA under an optimizer with two rates, which its update then takes group by group."""

    saved_as: ClassVar[str | None] = "lora"
    usual_rate: ClassVar[float] = 0.25  # of A: both matrices' geometric mean is then LoRA's

    def rate_factors(self) -> Mapping[str, float]:
        """The ratio for B; A and a task's own head learn at the rate itself."""
        return {".lora_B.": self.section.rate_ratio}
