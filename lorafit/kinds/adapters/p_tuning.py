"""P-tuning: vectors that stand before the tokens of every row are made by a small encoder, which is trained with them.

    embedding [tokens, hidden] -- encoder --> prompt [tokens, hidden], embeddings of the row --> the frozen model

    mlp    W3 ReLU(W2 ReLU(W1 e))
    lstm   W2 ReLU(W1 [forward LSTM; backward LSTM])        the paper's equation 6

The paper puts vectors anywhere in a template; PEFT's, which this is, stand before the row.

Source: Liu et al. 2021, GPT Understands, Too (https://arxiv.org/abs/2103.10385), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from lorafit.kinds.adapters import adapters
from lorafit.kinds.adapters._prompt import Prompt, PromptSection

if TYPE_CHECKING:
    from peft import PeftConfig

    from lorafit.facts import ModelShape

_LSTM_LAYERS = 2


class PTuningSection(PromptSection):
    """Vectors before the tokens, made by a trained encoder."""

    kind: Literal["p_tuning"] = "p_tuning"
    """P-tuning; it wants a larger learning rate than LoRA, e.g. 0.001."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """What makes the vectors: three linears, or an LSTM of both directions with two linears behind it."""
    encoder_size: int = Field(default=128, ge=1, le=65536)
    """Inner width of the encoder."""


@adapters.register(PTuningSection)
class PTuning(Prompt[PTuningSection]):
    """PEFT's P-tuning, in fp32."""

    peft_type: ClassVar[str] = "P_TUNING"
    usual_rate: ClassVar[float] = 5.0
    method: ClassVar[str] = "P-tuning"

    def parameters(self, shape: ModelShape) -> int:
        """Of the embedding and the encoder."""
        hidden, inner = shape.embedding_width, self.section.encoder_size
        vectors = super().parameters(shape)
        if self.section.encoder == "mlp":
            return vectors + _linear(hidden, inner) + _linear(inner, inner) + _linear(inner, hidden)
        inputs = [hidden, *[2 * inner] * (_LSTM_LAYERS - 1)]
        cells = sum(2 * 4 * inner * (width + inner + 2) for width in inputs)  # two directions, four gates, two biases
        return vectors + cells + _linear(2 * inner, 2 * inner) + _linear(2 * inner, hidden)

    def peft_config(self, target_modules: Sequence[str], *, is_transposed: bool) -> PeftConfig:
        """PEFT's PromptEncoderConfig; it finds the width in the model."""
        from peft import PromptEncoderConfig, PromptEncoderReparameterizationType

        return PromptEncoderConfig(
            num_virtual_tokens=self.section.tokens,
            encoder_reparameterization_type=PromptEncoderReparameterizationType(self.section.encoder.upper()),
            encoder_hidden_size=self.section.encoder_size,
            encoder_num_layers=_LSTM_LAYERS,
            num_transformer_submodules=1,  # PEFT would make as many for a decoder, and never read them
        )


def _linear(reads: int, writes: int) -> int:
    """Parameters of a linear with its bias."""
    return (reads + 1) * writes
