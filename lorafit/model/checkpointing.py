"""Gradient checkpointing of a loaded model, layer by layer: which of them run forward again in the backward pass, and
what each needs for that.

    layer's input ─> forward, nothing kept ─> ...  backward: forward again from the kept input, then its gradients

torch sets the random generators back for the second forward, so that it drops what the first one dropped. To read and
write a card's takes several calls of the host, each layer and pass; a layer that draws nothing goes without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from lorafit.errors import ModelError
from lorafit.ops.recomputed_layers import Checkpointing, recomputed_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def set_checkpointing(model: PreTrainedModel, checkpointing: Checkpointing) -> None:
    """Sets which layers recompute their activations in the backward pass (non-reentrant); loss and gradients stay.

    transformers' own switch would make the embeddings' result require a gradient, which only reentrant checkpointing
    needs, and leave it so when switched off.

    Raises:
        ModelError: It is asked for, and the model's class cannot.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    able = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = {part for layer in able for part in layer.modules() if part is not layer}
    layers = [layer for layer in able if layer not in inner]
    if checkpointing and not layers:
        what = f"transformers cannot recompute the layers of {base.config.model_type}"
        raise ModelError(what, key="training.gradient_checkpointing", todo="write false")
    recomputed = recomputed_layers(checkpointing, len(layers))
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number in recomputed
        layer._gradient_checkpointing_func = _Recomputation()
    base.config.use_cache = False


class _Recomputation:
    """What a layer's forward runs through; whether it draws random numbers is seen at the first time."""

    def __init__(self) -> None:
        self._draws: bool | None = None

    def __call__(self, forward: Callable[..., Any], *arguments: Any) -> Any:
        before = _generators() if self._draws is None else None
        result = checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=self._draws is not False)
        if before is not None:
            self._draws = before != _generators()
        return result


def _generators() -> list[list[int]]:
    """State of torch's generators, which live on the host."""
    on_cards = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [state.tolist() for state in (torch.get_rng_state(), *on_cards)]
