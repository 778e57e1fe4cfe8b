"""Whether rows may share a forward of a model, found by trying it on a few tokens.

each row by itself    whole text at once  ==  piece by piece from its cache     else no answer can be written so
all rows at once      one new token each  ==  what each got by itself           else they take turns
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from lorafit.answering.forwards import forward, forward_rows
from lorafit.answering.row_cache import RowCache, is_plain
from lorafit.answering.stacked import Factors, sizes
from lorafit.errors import ModelError
from lorafit.ops.logits_distance import logits_distance
from lorafit.ops.process_memory import is_out_of_memory

_TEXTS = ((3, 1, 4, 1, 5, 9), (2, 7, 1), (1, 6, 1, 8))
_SCALE = 0.1


def try_rows(
    model: Any,
    names: Sequence[str | None],
    using: Callable[[Sequence[str | None]], AbstractContextManager[None]],
    allowed: float,
) -> bool:
    """Whether rows with these adapters answer in one forward as each by itself.

    Args:
        model: The base, or PEFT's model around it.
        names: The adapters of three rows.
        using: Switches adapters on, one a row.
        allowed: What rounding may do, as `logits_distance` measures.

    Raises:
        ModelError: Not even one row by itself answers from its cache as from its whole text.
    """
    device, alone = model.get_input_embeddings().weight.device, []
    shared: RowCache | None = None
    for name, ids in zip(names, _TEXTS, strict=True):
        with using([name]):
            whole = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[:, -1]
            _, cache = forward(model, [*ids[:1]], None)
            if is_plain(cache):
                _, cache = forward(model, [*ids[1:-1]], cache)
                shared = shared or RowCache(len(cache.layers))
                shared.add(cache)
            else:
                _, cache = forward(model, [*ids[:-1]], None)
            alone.append(forward(model, [ids[-1]], cache)[0])
        if not logits_distance(alone[-1], whole) <= allowed:
            what = "answers otherwise token by token than from a whole text"
            raise ModelError(what, key=name, todo="use lorafit generate")
    if shared is None:
        return False
    try:
        with using(names):
            together = forward_rows(model, [ids[-1] for ids in _TEXTS], shared)
    except Exception as error:  # whatever a model's own code meets in a cache that it does not know
        if is_out_of_memory(error):
            raise
        return False
    return logits_distance(together, torch.cat(alone)) <= allowed


def drawn_factors(linear: torch.nn.Module, generator: torch.Generator) -> Factors:
    """A product of rank 1 for a linear, small beside what it computes, and large beside rounding."""
    (inputs,), (outputs,) = sizes(linear)
    a, b = torch.randn(1, inputs, generator=generator), torch.randn(1, outputs, generator=generator)
    device = next(linear.parameters()).device
    return (a / inputs**0.5).to(device), (b * _SCALE).to(device)
