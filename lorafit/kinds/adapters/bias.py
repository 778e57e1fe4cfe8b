"""BitFit: bias vectors are trained, and nothing else.

    y = W x + b        b of linears, and of norms; W stays as it is

Source: Ben Zaken et al. 2021, BitFit (https://arxiv.org/abs/2106.10199), section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from lorafit.errors import RecipeError
from lorafit.kinds.adapter_parts import CopiedModules, Site
from lorafit.kinds.adapters import AdapterSection, adapters
from lorafit.kinds.adapters._copies import Copies

if TYPE_CHECKING:
    from peft import PeftModel

    from lorafit.facts import ModelShape


class BiasSection(AdapterSection):
    """The bias vectors of linears and norms."""

    kind: Literal["bias"] = "bias"
    """BitFit; it wants a larger learning rate than LoRA, e.g. 0.001."""


@adapters.register(BiasSection)
class Bias(Copies[BiasSection]):
    """PEFT's LN_TUNING on every layer that adds a bias, of whose copies no more than that is kept."""

    copies: ClassVar[CopiedModules] = "biases"
    usual_rate: ClassVar[float] = 5.0

    def sites(self, shape: ModelShape) -> tuple[Site, ...]:
        """Every layer with a bias.

        Raises:
            RecipeError: The model has none, as Llama.
        """
        biased = [module for module in shape.holders if module.biased and not module.uncopied]
        if not biased:
            what = f"{shape.model_type} has no bias vector: its linears and norms add none"
            raise RecipeError(what, key="adapter.kind", todo="use layer_norm or lora")
        return tuple(Site("module", module.name, module.biased, module.bias_parameters) for module in biased)

    def refuses(self, quantization_kind: str) -> str | None:
        """PEFT copies the whole layer of a bias, and lets gradients flow to all of the copy."""
        if quantization_kind == "none":
            return None
        return (
            f"bias tuning keeps a bias in a copy of its layer, and weights in {quantization_kind} are codes, of which "
            "PEFT can make no copy that takes gradients"
        )

    def settle(self, model: PeftModel) -> None:
        """Leaves of each copy its bias, in fp32."""
        from lorafit.ops.trained_copies import keep_only

        keep_only(model, model.active_adapter, lambda _, own: own == "bias")
