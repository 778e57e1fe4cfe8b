"""What the methods share that train vectors before the tokens of every row, and change no weight.

    vectors [tokens, ...], trained themselves or made by a small encoder --> before the row --> the frozen model

An encoder is of use while training alone: whoever opens the adapter reads the vectors that it made, as PEFT does. The
folder holds both, so that a run goes on from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, TypeVar

from pydantic import Field

from lorafit.contracts import JsonMapping
from lorafit.errors import ModelError
from lorafit.kinds.adapter_parts import Rank, SavedField, Site
from lorafit.kinds.adapters import Adapter, AdapterSection
from lorafit.kinds.adapters._saved import head_values
from lorafit.kinds.folding import Folding
from lorafit.kinds.section import PACKED

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from lorafit.facts import ModelShape

_VECTORS = "prompt_embeddings"
_ENCODER = "prompt_encoder."


class PromptSection(AdapterSection):
    """Trained vectors before the tokens."""

    tokens: int = Field(default=20, ge=1, le=4096)
    """How many vectors; each takes the place of a token."""


P_co = TypeVar("P_co", bound=PromptSection, covariant=True)


class Prompt(Adapter[P_co]):
    """PEFT's prompt learning, in fp32.

    Attributes:
        method: What a merge calls it.
        trained: What it says that is trained.
    """

    method: ClassVar[str]
    trained: ClassVar[str] = "vectors that stand before the tokens"

    saved_fields: ClassVar[Mapping[str, SavedField]] = {
        "num_virtual_tokens": SavedField(Rank, "a whole number from 1", needed=True)
    }
    recipe_fields: ClassVar[Mapping[str, str]] = {"num_virtual_tokens": "tokens"}
    resumed_prefix: ClassVar[str] = _ENCODER
    unread: ClassVar[Mapping[str, str]] = {
        PACKED: "begins a row with vectors of its own, and a packed row holds several"
    }

    def sites(self, shape: ModelShape) -> tuple[Site, ...]:
        """The vectors, and what makes them."""
        return (Site("prompt", "prompt", self.section.tokens, self.parameters(shape)),)

    def parameters(self, shape: ModelShape) -> int:
        """Trained ones: of vectors as wide as a token's embedding."""
        return self.section.tokens * shape.embedding_width

    def fit(self, config: PeftConfig, model: PreTrainedModel, layers: Mapping[str, int]) -> None:
        """The embedding's width and the number of heads, which PEFT does not find in every config (DistilBERT's)."""
        heads = getattr(model.config.get_text_config(), "num_attention_heads", 1)
        config.token_dim = model.get_input_embeddings().weight.shape[-1]
        config.num_attention_heads = heads if isinstance(heads, int) else 1

    def settle(self, model: PeftModel) -> None:
        """An encoder computes in fp32 whatever the model does, as where the vectors are saved that it makes."""
        for encoder in model.prompt_encoder.values():
            encoder.forward = _without_autocast(encoder.forward)

    @classmethod
    def live_tensors(cls, model: PeftModel, name: str) -> dict[str, torch.Tensor]:
        """The vectors, as PEFT calls them, or their encoder's parameters; and a task's own head."""
        encoder = model.prompt_encoder[name]
        own = {f"{_ENCODER}{path}": value for path, value in encoder.named_parameters()}
        return {**(own if len(own) > 1 else {_VECTORS: encoder.embedding.weight}), **head_values(model, name)}

    @classmethod
    def derived_tensors(cls, model: PeftModel, name: str) -> dict[str, torch.Tensor]:
        """The vectors that an encoder makes."""
        has_encoder = len([*model.prompt_encoder[name].parameters()]) > 1
        return {_VECTORS: model.get_prompt_embedding_to_save(name)} if has_encoder else {}

    @classmethod
    def folding(cls, config: JsonMapping) -> Folding:
        """Vectors before the tokens change no weight.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            f"cannot be merged: {cls.method} trains {cls.trained}, and changes no weight",
            todo="answer with the adapter beside its base",
        )


def _without_autocast(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(numbers: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.autocast(numbers.device.type, enabled=False):
            return forward(numbers)

    return run
