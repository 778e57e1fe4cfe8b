"""Full fine-tuning: every parameter of the language model is trained. What the other methods are measured against.

    memory of a parameter       base 2 (bf16)   trained 4   gradient 4   AdamW 8     bytes; of 8-bit AdamW 2

The base stays beside what is trained, so that both are scored and answer in one process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from lorafit.console.wording import list_names
from lorafit.errors import RecipeError
from lorafit.kinds.adapter_parts import CopiedModules, Site
from lorafit.kinds.adapters import AdapterSection, adapters
from lorafit.kinds.adapters._copies import Copies

if TYPE_CHECKING:
    from lorafit.facts import ModelShape


class FullSection(AdapterSection):
    """Every parameter of the language model."""

    kind: Literal["full"] = "full"
    """Full fine-tuning; it wants a smaller learning rate than LoRA, e.g. 0.00002."""


@adapters.register(FullSection)
class Full(Copies[FullSection]):
    """PEFT's LN_TUNING on every layer of the language model."""

    copies: ClassVar[CopiedModules] = "all"
    usual_rate: ClassVar[float] = 0.1

    def sites(self, shape: ModelShape) -> tuple[Site, ...]:
        """Every module with parameters.

        Raises:
            RecipeError: Of some no copy can stand in their place.
        """
        uncopied = {module.name: module.uncopied for module in shape.holders if module.uncopied}
        if uncopied:
            what = f"{list_names(uncopied)} of {shape.model_type} cannot be copied: {next(iter(uncopied.values()))}"
            todo = "use lora, with a high rank if need be"
            raise RecipeError(f"full is not for this model: {what}", key="adapter.kind", todo=todo)
        return tuple(Site("module", module.name, module.count, module.parameters) for module in shape.holders)

    def refuses(self, quantization_kind: str) -> str | None:
        """Codes of few bits have no gradient, and steps are smaller than theirs."""
        if quantization_kind == "none":
            return None
        return (
            f"full fine-tuning trains the weights themselves, and those in {quantization_kind} are codes: they have no "
            "gradient, and a step of the optimizer is far smaller than the distance of two codes"
        )
