"""LoRA-FA: LoRA whose A stays as it was drawn; B alone is trained, and no layer keeps its input for A's gradient.

    W' = W + (alpha / r) B A        dL/dB = (alpha / r) dL/dy^T (x A^T)        kept for it: x A^T, r values a token

The optimizer gets this gradient as it is, as in the paper's first version. PEFT's `create_lorafa_optimizer` multiplies
it by (r / alpha)^2 (A A^T)^-1 before, which brings the change of B A closest to that of full fine-tuning; that is not
done here. What is saved is a plain LoRA adapter, A among it.
Source: Zhang et al. 2023, LoRA-FA (https://arxiv.org/abs/2308.03303), section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from lorafit.kinds.adapters import adapters
from lorafit.kinds.adapters._low_rank import LowRankSection, PlainLowRank

if TYPE_CHECKING:
    from peft import PeftModel

    from lorafit.facts import LinearShape


class LoraFaSection(LowRankSection):
    """Low-rank adapters beside frozen linears, of whose two matrices only B is trained."""

    kind: Literal["lora_fa"] = "lora_fa"
    """LoRA-FA."""


@adapters.register(LoraFaSection)
class LoraFa(PlainLowRank[LoraFaSection]):
    """PEFT's LoRA with a frozen A."""

    saved_as: ClassVar[str | None] = "lora"

    def layer_parameters(self, linear: LinearShape, rank: int) -> int:
        """Of B [out, rank]."""
        return rank * linear.out_features

    def settle(self, model: PeftModel) -> None:
        """Freezes every A."""
        super().settle(model)
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
