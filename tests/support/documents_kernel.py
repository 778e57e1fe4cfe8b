"""A CPU's kernel for torch's variable-length attention, which has none: each document by itself, in plain products."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn.attention import varlen


class Call(NamedTuple):
    """What the operation was handed."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    bounds: list[int]
    longest: int
    scale: float
    window: list[int]


CALLS: list[Call] = []
FAULTS: set[str] = set()
"""`mixes`: documents see each other; `backward`: gradients are twice what they are."""


@cache
def register_documents_kernel() -> None:
    """For the process: torch keeps it, and nothing else computes that operation on a CPU."""
    varlen._varlen_attn.register_kernel("cpu")(_forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(_backward)


def _forward(
    query: Any,
    key: Any,
    value: Any,
    bounds: Any,
    key_bounds: Any,
    longest: int,
    longest_key: int,
    is_causal: bool,
    scale: float,
    window: list[int],
    is_grouped: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert bounds.dtype == torch.int32 and torch.equal(bounds, key_bounds) and longest == longest_key
    assert is_causal == (window == [-1, 0]) and is_grouped == (query.shape[1] != key.shape[1])
    assert query.dtype == key.dtype == value.dtype
    CALLS.append(Call(tuple(query.shape), tuple(key.shape), bounds.tolist(), longest, scale, window))
    if "mixes" in FAULTS:
        bounds = bounds[[0, -1]]
    parts = [_weights(q, k, scale, window)[0] @ _repeated(v, q) for q, k, v in _documents(bounds, query, key, value)]
    out = torch.cat([part.transpose(0, 1) for part in parts]).to(query.dtype).contiguous()
    sums = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    return out, sums, torch.zeros(2, dtype=torch.uint64)


def _backward(
    gradient: Any, query: Any, key: Any, value: Any, out: Any, sums: Any, bounds: Any, key_bounds: Any, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _, _, _, _, scale, window = rest
    found: list[list[torch.Tensor]] = [[], [], []]
    for q, k, v, g in _documents(bounds, query, key, value, gradient):
        weights, keys = _weights(q, k, scale, window)
        g = g.transpose(0, 1).float()
        each = g @ _repeated(v, q).transpose(1, 2)
        scores = scale * weights * (each - (each * weights).sum(-1, keepdim=True))
        groups = (k.shape[1], q.shape[1] // k.shape[1], *keys.shape[1:])
        parts = (
            scores @ keys,
            (scores.transpose(1, 2) @ q.transpose(0, 1).float()).view(groups).sum(1),
            (weights.transpose(1, 2) @ g).view(groups).sum(1),
        )
        for all_of, part in zip(found, parts, strict=True):
            all_of.append(part.transpose(0, 1) * (2 if "backward" in FAULTS else 1))
    dq, dk, dv = (torch.cat(parts).to(query.dtype).contiguous() for parts in found)
    return dq, dk, dv


def _documents(bounds: torch.Tensor, *tensors: torch.Tensor) -> Any:
    return zip(*(tensor.split(bounds.diff().tolist()) for tensor in tensors), strict=True)


def _repeated(keys: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """[heads, seq, dim] of [seq, key heads, dim], fp32."""
    return keys.transpose(0, 1).float().repeat_interleave(query.shape[1] // keys.shape[1], 0)


def _weights(
    query: torch.Tensor, key: torch.Tensor, scale: float, window: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    keys, tokens = _repeated(key, query), query.shape[0]
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril(window[1])
    seen = seen if window[0] < 0 else seen.triu(-window[0])
    scores = scale * query.transpose(0, 1).float() @ keys.transpose(1, 2)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1), keys
