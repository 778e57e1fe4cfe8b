"""Prompt tuning: vectors that stand before the tokens of every row are trained, and nothing else.

    prompt [tokens, hidden], embeddings of the row [row tokens, hidden] --> the frozen model

Source: Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning (https://arxiv.org/abs/2104.08691).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.kinds.adapters import adapters
from lorafit.kinds.adapters._prompt import Prompt, PromptSection

if TYPE_CHECKING:
    from peft import PeftConfig


class PromptTuningSection(PromptSection):
    """Trained vectors before the tokens."""

    kind: Literal["prompt_tuning"] = "prompt_tuning"
    """Prompt tuning; it wants a larger learning rate than LoRA, e.g. 0.01."""
    init: Literal["vocabulary", "random"] = "vocabulary"
    """First values: embeddings of random tokens, or of the normal distribution."""


@adapters.register(PromptTuningSection)
class PromptTuning(Prompt[PromptTuningSection]):
    """PEFT's prompt tuning, in fp32."""

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    usual_rate: ClassVar[float] = 50.0
    method: ClassVar[str] = "prompt tuning"

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
