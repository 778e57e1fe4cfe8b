"""rsLoRA: LoRA whose update is scaled by alpha / sqrt(r), so that a higher rank learns neither slower nor faster.

    W' = W + (alpha / sqrt(r)) B A

Source: Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA
(https://arxiv.org/abs/2312.03732), equation 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from lorafit.contracts import JsonValue
from lorafit.kinds.adapters import adapters
from lorafit.kinds.adapters._low_rank import LowRankSection, PlainLowRank


class RsloraSection(LowRankSection):
    """Low-rank adapters beside frozen linears, scaled by the root of their rank."""

    kind: Literal["rslora"] = "rslora"
    """Rank-stabilised LoRA."""
    alpha: float = Field(default=32.0, gt=0.0, le=1e6, allow_inf_nan=False)
    """The update is scaled by alpha / sqrt(r), which is sqrt(r) times as much as LoRA's."""


@adapters.register(RsloraSection)
class Rslora(PlainLowRank[RsloraSection]):
    """PEFT's LoRA with `use_rslora`."""

    peft_options: ClassVar[Mapping[str, JsonValue]] = {"use_rslora": True, "use_dora": False}

    @property
    def closed_form(self) -> bool:
        """As LoRA, whose step it is: with one rank, in all layers alike."""
        return self.is_uniform
