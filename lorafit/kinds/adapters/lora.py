"""LoRA: a frozen weight W becomes W + (alpha / r) * B A, and only A [r, in] and B [out, r] are trained.

Source: Hu et al. 2021, LoRA (https://arxiv.org/abs/2106.09685), section 4.1.
"""

from __future__ import annotations

from collections.abc import Set
from typing import ClassVar, Literal

from lorafit.contracts import JsonMapping
from lorafit.kinds.adapters import adapters
from lorafit.kinds.adapters._low_rank import LowRank, LowRankSection


class LoraSection(LowRankSection):
    """Low-rank adapters beside frozen linears."""

    kind: Literal["lora"] = "lora"
    """LoRA."""


@adapters.register(LoraSection)
class Lora(LowRank[LoraSection]):
    """PEFT's LoRA; variants of it that the recipe does not know are opened as PEFT computes them."""

    starts_as_base: ClassVar[bool] = True

    @property
    def closed_form(self) -> bool:
        """With one rank, in all layers alike."""
        return self.is_uniform

    @classmethod
    def why_no_effect(cls, config: JsonMapping, nonzero_tensors: Set[str]) -> str | None:
        """A B of zeros in every layer, or an alpha of 0."""
        if all(".lora_A." in name for name in nonzero_tensors):
            return "every lora_B is zero"
        return "its lora_alpha is 0" if config["lora_alpha"] == 0 else None
