"""LoRA: a frozen weight W becomes W + (alpha / r) * B A, and only A [r, in] and B [out, r] are trained.

Source: Hu et al. 2021, LoRA (https://arxiv.org/abs/2106.09685), section 4.1.
"""

from __future__ import annotations

from typing import Literal

from lorafit.kinds.adapters import adapters
from lorafit.kinds.adapters._low_rank import LowRankSection, PlainLowRank


class LoraSection(LowRankSection):
    """Low-rank adapters beside frozen linears."""

    kind: Literal["lora"] = "lora"
    """LoRA."""


@adapters.register(LoraSection)
class Lora(PlainLowRank[LoraSection]):
    """PEFT's LoRA; variants of it that the recipe does not know are opened as PEFT computes them."""

    @property
    def closed_form(self) -> bool:
        """With one rank, in all layers alike."""
        return self.is_uniform
