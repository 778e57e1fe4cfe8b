"""What an adapter trains before the tokens of each row: vectors in the sequence, or keys and values of its layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def count_virtual_tokens(model: nn.Module) -> int:
    """How many positions the active adapter takes there; 0 for other methods, for a plain model, and with the adapter
    off."""
    adapted: Any = model
    if not hasattr(model, "peft_config") or adapted._adapters_disabled:
        return 0
    config = adapted.active_peft_config
    return int(config.num_virtual_tokens) if config.is_prompt_learning else 0


def count_leading_vectors(model: nn.Module) -> int:
    """How many of those stand in the sequence itself, before each row's states and logits: none that are a prefix of
    keys and values."""
    adapted: Any = model
    count = count_virtual_tokens(model)
    return 0 if count and hasattr(adapted.active_peft_config, "prefix_projection") else count


@contextlib.contextmanager
def placed_vectors(model: nn.Module) -> Iterator[tuple[Any, int]]:
    """The transformers model, which sees an adapter's vectors in place of a row's first tokens, and how many those are.

    It gets token ids, by which causal models with a head find where a padded row ends; PEFT's own forward hands
    embeddings on, whose last place they take for the end.
    """
    adapted: Any = model
    count = count_leading_vectors(model)
    if not count:
        yield model, 0
        return

    def place(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        vectors = adapted.get_prompt(batch_size=len(output)).to(output.dtype)
        return torch.cat([vectors, output[:, count:]], dim=1)

    base = adapted.get_base_model()
    with base.get_input_embeddings().register_forward_hook(place):
        yield base, count
