"""Rows that a forward takes one token further, each with a key-value cache that the model made for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from lorafit.answering.choosing import LiveRow, choose_tokens
from lorafit.errors import ModelError

if TYPE_CHECKING:
    from lorafit.answering.engine import Engine

READ_AT_ONCE_TOKENS = 512
"""Most tokens of a prompt in one forward: rows that are being answered wait so long for their next token."""


class LiveBatch:
    """One row while it is answered, with one adapter switched on, or none.

    Args:
        engine: Whose model runs.
        using: Switches the row's adapter on.
        row: It.
    """

    def __init__(self, engine: Engine, using: Callable[[], AbstractContextManager[None]], row: LiveRow) -> None:
        self._engine, self._using, self._cache = engine, using, None
        self.rows = [row]
        self._read_tokens = 0

    @property
    def is_reading(self) -> bool:
        """Whether part of the prompt is not read yet."""
        return self._read_tokens < len(self.rows[0].prompt)

    def step(self) -> None:
        """Reads more of the prompt, or takes the row one token further."""
        row = self.rows[0]
        ids = [row.tokens[-1]] if row.tokens else row.prompt[self._read_tokens :][:READ_AT_ONCE_TOKENS]
        with self._using():
            logits, self._cache = forward(self._engine, ids, self._cache)
        self._read_tokens += len(ids)
        if not self.is_reading:
            choose_tokens([row], logits)


def forward(engine: Engine, ids: list[int], cache: Any) -> tuple[torch.Tensor, Any]:
    """Logits of the last of a row's next tokens, `[1, vocabulary]`, and the cache with all of them.

    What an adapter puts before the prompt is in the cache behind the first call, so that the base goes on alone.

    Raises:
        ModelError: The model keeps nothing between tokens.
    """
    model: Any = engine.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = "past_key_values" if "past_key_values" in inspect.signature(base.forward).parameters else "cache_params"
    asked = model if cache is None else base
    given = {} if cache is None else {name: cache}
    output = asked(input_ids=torch.tensor([ids], device=engine.device), use_cache=True, **given)
    cache = getattr(output, name, None)
    if cache is None:
        what = f"{type(base).__name__} keeps nothing of a prompt from token to token"
        raise ModelError(what, todo="use lorafit generate")
    return output.logits[:, -1], cache
