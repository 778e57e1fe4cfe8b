"""Prompt tuning: vectors that stand before the tokens of every row are trained, and nothing else.

    prompt [tokens, hidden], embeddings of the row [row tokens, hidden] --> the frozen model

Source: Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning (https://arxiv.org/abs/2104.08691).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import ModelError
from lorafit.kinds.adapters import Adapter, AdapterSection, Folding, Rank, SavedField, Site, adapters

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel

    from lorafit.facts import ModelShape

_TENSOR = "prompt_embeddings"


class PromptTuningSection(AdapterSection):
    """Trained vectors before the tokens."""

    kind: Literal["prompt_tuning"] = "prompt_tuning"
    """Prompt tuning; it wants a larger learning rate than LoRA, e.g. 0.01."""
    tokens: int = Field(default=20, ge=1, le=4096)
    """How many vectors; each takes the place of a token."""
    init: Literal["vocabulary", "random"] = "vocabulary"
    """First values: embeddings of random tokens, or of the normal distribution."""


@adapters.register(PromptTuningSection)
class PromptTuning(Adapter[PromptTuningSection]):
    """PEFT's prompt tuning, in fp32."""

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    saved_fields: ClassVar[Mapping[str, SavedField]] = {
        "num_virtual_tokens": SavedField(Rank, "a whole number from 1", needed=True)
    }
    recipe_fields: ClassVar[Mapping[str, str]] = {"num_virtual_tokens": "tokens"}

    def sites(self, shape: ModelShape) -> tuple[Site, ...]:
        """The vectors, as wide as the model's stream."""
        return (Site("prompt", "prompt", self.section.tokens, self.section.tokens * shape.hidden_size),)

    def peft_config(self, target_modules: Sequence[str], *, is_transposed: bool) -> PeftConfig:
        """PEFT's PromptTuningConfig; it finds the width in the model."""
        from peft import PromptTuningConfig, PromptTuningInit

        init = PromptTuningInit.SAMPLE_VOCAB if self.section.init == "vocabulary" else PromptTuningInit.RANDOM
        tokens = self.section.tokens  # submodules: PEFT would make as many for a decoder, and never read them
        return PromptTuningConfig(num_virtual_tokens=tokens, prompt_tuning_init=init, num_transformer_submodules=1)

    @classmethod
    def opened_config(cls, config: JsonMapping) -> JsonObject:
        """The saved one, which would open a tokenizer for first values: those come from the file."""
        texts = ("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
        return {**{key: value for key, value in config.items() if key not in texts}, "prompt_tuning_init": "RANDOM"}

    @classmethod
    def live_tensors(cls, model: PeftModel, name: str) -> dict[str, torch.Tensor]:
        """The vectors and a task's own head, called as PEFT saves them."""
        mark = f".modules_to_save.{name}."
        head = {path.replace(mark, "."): value for path, value in model.named_parameters() if mark in path}
        return {_TENSOR: model.prompt_encoder[name].embedding.weight, **head}

    @classmethod
    def folding(cls, config: JsonMapping) -> Folding:
        """A prompt changes no weight.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            "cannot be merged: prompt tuning trains vectors that stand before the tokens, and changes no weight",
            todo="answer with the adapter beside its base",
        )
