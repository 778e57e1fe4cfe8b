"""Causal attention for training on a CPU: blocks of queries, each against the keys that it may see.

    keys      0 1 2 3 4 5
    block 1   · - - -          scores of a block: [queries, keys up to its end]; - is masked, on the diagonal only
              · · - -
    block 2   · · · · - -      what lies right of a block is never computed
              · · · · · -

    P = softmax(s Q K^T)    O = P V                      softmax in fp32, its result in the dtype of Q

Only Q, K and V are kept, K and V with their own number of heads: the backward pass computes P of each block again.
Source: Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762), equation 1, differentiated by hand; blocks and
recomputation as in Dao et al. 2022, FlashAttention (https://arxiv.org/abs/2205.14135), section 3.1:

    dV = P^T dO      dS = P * (dP - rowsum(dP * P)), dP = dO V^T      dQ = s dS K      dK = s dS^T Q

Plain matrix products: on a CPU in bf16 the backward pass of torch's own flash attention costs twice as much at 225
tokens a row, and more for shorter rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from lorafit.ops.chunk_sizes import BLOCK_TOKENS, chunk_rows, cut_blocks, padded_keys


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale Q K^T) V; each token sees itself and those before it.

    Args:
        query: [batch, heads, seq, head_dim].
        key: [batch, key_heads, seq, head_dim], in the dtype of query; heads are a multiple of key_heads, and query head
            h reads key head h // (heads / key_heads).
        value: [batch, key_heads, seq, value_dim].
        scale: Of the scores.

    Returns:
        [batch, seq, heads, value_dim], contiguous.
    """
    result: torch.Tensor = _CausalAttention.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return result


class _CausalAttention(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        batch, heads, tokens, _ = query.shape
        output = query.new_empty(batch, tokens, heads, value.shape[-1])
        mask = _future(query)
        for rows, block in _blocks(batch, tokens):
            q, k, v = _cut(query[rows], key[rows], value[rows], block, scale)
            p = _probabilities(q, k, mask, block)
            output[rows, block].transpose(1, 2).copy_(_by_head(torch.bmm(p, v), heads, block))
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        batch, heads, tokens, _ = query.shape
        grad_query, grad_key, grad_value = (_empty_by_token(tensor) for tensor in (query, key, value))
        mask = _future(query)
        # Blocks add to the keys' gradients: in fp32, so that long rows with many blocks lose nothing.
        wide = torch.promote_types(query.dtype, torch.float32)
        for rows, blocks in _chunks(batch, tokens):
            keys, values = key[rows], value[rows]
            sum_key, sum_value = (
                torch.zeros(x.shape, dtype=wide, device=x.device).flatten(0, 1) for x in (keys, values)
            )
            for block in blocks:
                q, k, v = _cut(query[rows], keys, values, block, ctx.scale)
                grad = _by_key_head(grad_output[rows, block].transpose(1, 2), key.shape[1])
                grad_q, grad_k, grad_v = _block_gradients(q, k, v, grad, mask, block)
                sum_key[:, : block.stop] += grad_k[:, : block.stop]
                sum_value[:, : block.stop] += grad_v[:, : block.stop]
                grad_query[rows, :, block] = _by_head(grad_q.mul_(ctx.scale), heads, block)
            grad_key[rows] = sum_key.view_as(keys)
            grad_value[rows] = sum_value.view_as(values)
        return grad_query, grad_key, grad_value, None


def _cut(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: slice[int, int, None], scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A block's queries, scaled, and the keys and values that they may see, by key head; `padded_keys` of them."""
    key_heads, fill = key.shape[1], padded_keys(block) - block.stop
    q = _by_key_head(query[:, :, block] * scale, key_heads)
    k, v = (_by_key_head(tensor[:, :, : block.stop], key_heads) for tensor in (key, value))
    return (q, functional.pad(k, (0, 0, 0, fill)), functional.pad(v, (0, 0, 0, fill))) if fill else (q, k, v)


def _probabilities(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, block: slice[int, int, None]) -> torch.Tensor:
    """Of a block, [rows * key_heads, heads per key head * queries, keys]; softmax computes in fp32 whatever the
    dtype."""
    scores = torch.bmm(q, k.transpose(1, 2))
    queries, behind = block.stop - block.start, k.shape[1] - block.start
    scores.view(-1, queries, k.shape[1])[:, :, block.start :].add_(mask[:queries, :behind])
    return torch._softmax(scores, -1, False)


def _block_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    mask: torch.Tensor,
    block: slice[int, int, None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a block's scaled queries, keys and values; three sets of its scores are alive at most."""
    p = _probabilities(q, k, mask, block)
    grad_v = torch.bmm(p.transpose(1, 2), grad)
    grad_scores = torch._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), p, -1, p.dtype)
    return torch.bmm(grad_scores, k), torch.bmm(grad_scores.transpose(1, 2), q), grad_v


def _by_key_head(tensor: torch.Tensor, key_heads: int) -> torch.Tensor:
    """[rows, heads, seq, dim] as [rows * key_heads, heads per key head * seq, dim]."""
    return tensor.reshape(tensor.shape[0] * key_heads, -1, tensor.shape[-1])


def _by_head(product: torch.Tensor, heads: int, block: slice) -> torch.Tensor:
    """[rows, heads, queries, dim] of a block's product."""
    return product.view(-1, heads, block.stop - block.start, product.shape[-1])


def _empty_by_token(tensor: torch.Tensor) -> torch.Tensor:
    """[batch, heads, seq, dim] that lies as [batch, seq, heads, dim], as the linear below wants its gradient."""
    batch, heads, tokens, dim = tensor.shape
    return tensor.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _future(query: torch.Tensor) -> torch.Tensor:
    """What a diagonal block adds to its scores: -inf where the key comes behind the query, or is none."""
    size = min(BLOCK_TOKENS, query.shape[2])
    return query.new_full((size, padded_keys(slice(0, size))), float("-inf")).triu_(1)


def _chunks(batch: int, tokens: int) -> Iterator[tuple[slice, list[slice]]]:
    """Rows that go together, and their blocks of queries."""
    size, blocks = chunk_rows(tokens), cut_blocks(tokens)
    return ((slice(start, min(start + size, batch)), blocks) for start in range(0, batch, size))


def _blocks(batch: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    return ((rows, block) for rows, blocks in _chunks(batch, tokens) for block in blocks)
