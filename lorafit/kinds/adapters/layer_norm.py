"""LayerNorm tuning: gains, and biases where there are, of all norms are trained, and nothing else.

Source: Zhao et al. 2023, Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning
(https://arxiv.org/abs/2312.11420), section 3.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from lorafit.errors import RecipeError
from lorafit.kinds.adapter_parts import CopiedModules, Site
from lorafit.kinds.adapters import AdapterSection, adapters
from lorafit.kinds.adapters._copies import Copies

if TYPE_CHECKING:
    from lorafit.facts import ModelShape


class LayerNormSection(AdapterSection):
    """The norms' own parameters."""

    kind: Literal["layer_norm"] = "layer_norm"
    """LayerNorm tuning; it wants a larger learning rate than LoRA, e.g. 0.001."""


@adapters.register(LayerNormSection)
class LayerNorm(Copies[LayerNormSection]):
    """PEFT's LN_TUNING on every norm of the language model; also what opens the adapters of its siblings."""

    saved_as: ClassVar[str | None] = None
    copies: ClassVar[CopiedModules] = "norms"
    usual_rate: ClassVar[float] = 5.0

    def sites(self, shape: ModelShape) -> tuple[Site, ...]:
        """Every norm. Raises RecipeError where the model has none."""
        norms = [module for module in shape.holders if module.is_norm]
        if not norms:
            what = f"{shape.model_type} has no norm with parameters"
            raise RecipeError(what, key="adapter.kind", todo="use bias or lora")
        return tuple(Site("module", norm.name, norm.count, norm.parameters) for norm in norms)
