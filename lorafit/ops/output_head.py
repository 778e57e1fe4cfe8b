"""The layer of a language model that gives logits, also inside of a model of several modalities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorafit.contracts import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def output_head(model: PreTrainedModel) -> Any:
    """The layer that gives logits: the model's own, or that of the whole language model inside it; None without one."""
    head = model.get_output_embeddings()
    inner = text_part(model) if head is None else None
    return head if inner is None else inner.get_output_embeddings()


def text_part(model: PreTrainedModel) -> Any:
    """The language model inside a model of several modalities; None where the model is that itself, as an
    encoder-decoder of texts is."""
    config = model.config
    has_parts = bool(config.sub_configs) and not config.is_encoder_decoder and hasattr(model, "get_decoder")
    decoder = model.get_decoder() if has_parts else None
    return None if decoder is model else decoder


def outer_modules(model: PreTrainedModel) -> JsonObject:
    """Modules beside the backbone of a transformers model that hold weights, by name: its head."""
    if not hasattr(model, model.base_model_prefix):
        return {}
    beside = {name: module for name, module in model.named_children() if name != model.base_model_prefix}
    return {name: module for name, module in beside.items() if next(module.parameters(), None) is not None}
