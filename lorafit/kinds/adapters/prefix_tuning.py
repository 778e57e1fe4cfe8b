"""Prefix tuning: keys and values that stand before those of the tokens are trained, in every layer.

    layer:   keys [prefix; row]    values [prefix; row]     prefix [tokens, 2 * layers * kv heads * head size]

Source: Li and Liang 2021, Prefix-Tuning (https://arxiv.org/abs/2101.00190), equations 3 and, with `projection`, 4:
P[i, :] = MLP(P'[i, :]), of which the P alone are of use when the training is over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from lorafit.errors import RecipeError
from lorafit.kinds.adapter_parts import Site
from lorafit.kinds.adapters import adapters
from lorafit.kinds.adapters._prompt import Prompt, PromptSection

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from lorafit.facts import ModelShape


class PrefixTuningSection(PromptSection):
    """Trained keys and values before those of the tokens, in every layer."""

    kind: Literal["prefix_tuning"] = "prefix_tuning"
    """Prefix tuning; it wants a larger learning rate than LoRA, e.g. 0.01, or 0.001 with `projection`."""
    projection: bool = False
    """Whether a small network makes them while training: the paper finds that steadier, with many more parameters."""
    projection_size: int = Field(default=512, ge=1, le=65536)
    """Inner width of that network."""
    init: Literal["random", "zero"] = "random"
    """First values: of the normal distribution (with `projection` as the network makes them), or zeros, which still
    take attention from the tokens."""


@adapters.register(PrefixTuningSection)
class PrefixTuning(Prompt[PrefixTuningSection]):
    """PEFT's prefix tuning, in fp32."""

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    usual_rate: ClassVar[float] = 50.0
    method: ClassVar[str] = "prefix tuning"
    trained: ClassVar[str] = "keys and values that stand before those of the tokens"
    no_checkpointing: ClassVar[str] = (
        "its keys and values reach the layers as a cache, which layers that run forward again do without"
    )

    def sites(self, shape: ModelShape) -> tuple[Site, ...]:
        """The keys and values, and what makes them.

        Raises:
            RecipeError: The model's layers take none, or PEFT gives them wrong ones.
        """
        why = None
        if shape.scanning_layers:
            why = f"{shape.scanning_layers} layers of {shape.model_type} keep a state in the place of keys and values"
        elif shape.decoder_parameters:
            why = "PEFT gives all layers of a decoder beside an encoder the keys and values of the first"
        if why is not None:
            todo = "use prompt_tuning, p_tuning or lora"
            raise RecipeError(f"prefix_tuning is not for this model: {why}", key="adapter.kind", todo=todo)
        return super().sites(shape)

    def fit(self, config: PeftConfig, model: PreTrainedModel, layers: Mapping[str, int]) -> None:
        """Nothing: PEFT finds how wide keys and values are in the configs of all models that take them.

        Raises:
            RecipeError: This one takes none, as an encoder that was never meant for a decoder.
        """
        readers = (model, getattr(model, model.base_model_prefix, model))
        if not any("past_key_values" in signature(reader.forward).parameters for reader in readers):
            what = f"prefix_tuning is not for this model: {type(model).__name__} takes no keys and values"
            raise RecipeError(what, key="adapter.kind", todo="use prompt_tuning, p_tuning or lora")

    def parameters(self, shape: ModelShape) -> int:
        """A key and a value a layer and token, or what makes them."""
        width, inner = shape.kv_heads * shape.head_dim, self.section.projection_size
        if not self.section.projection:
            return self.section.tokens * 2 * shape.layers * width
        return self.section.tokens * width + (width + 1) * inner + (inner + 1) * 2 * shape.layers * width

    def peft_config(self, target_modules: Sequence[str], *, is_transposed: bool) -> PeftConfig:
        """PEFT's PrefixTuningConfig; it finds layers and heads in the model."""
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            num_virtual_tokens=self.section.tokens,
            prefix_projection=self.section.projection,
            encoder_hidden_size=self.section.projection_size,
            init_weights="zero" if self.section.init == "zero" else None,
        )
