"""One forward for tokens that follow what a cache holds: several of one row, or one of each of several rows."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from lorafit.answering.row_cache import RowCache
from lorafit.errors import ModelError


def forward(model: Any, ids: list[int], cache: Any) -> tuple[torch.Tensor, Any]:
    """Logits of the last of a row's next tokens, `[1, vocabulary]`, and the cache with all of them.

    What an adapter puts before the prompt is in the cache behind the first call, so that the base goes on alone.

    Raises:
        ModelError: The model keeps nothing between tokens.
    """
    base, device = _base_of(model), model.get_input_embeddings().weight.device
    name = "past_key_values" if _takes(base, "past_key_values") else "cache_params"
    given = {} if cache is None else {name: cache}
    output = (model if cache is None else base)(input_ids=torch.tensor([ids], device=device), use_cache=True, **given)
    cache = getattr(output, name, None)
    if cache is None:
        what = f"{type(base).__name__} keeps nothing of a prompt from token to token"
        raise ModelError(what, todo="use lorafit generate")
    return output.logits[:, -1], cache


def forward_rows(model: Any, ids: list[int], cache: RowCache) -> torch.Tensor:
    """Logits of one new token of each row, `[rows, vocabulary]`."""
    base, device = _base_of(model), model.get_input_embeddings().weight.device
    positions, mask = cache.place(device)
    given = {"position_ids": positions} if _takes(base, "position_ids") else {}
    tokens = torch.tensor(ids, device=device)[:, None]
    output = base(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **given)
    logits: torch.Tensor = output.logits[:, -1]
    return logits


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _takes(model: torch.nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters
