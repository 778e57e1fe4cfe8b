"""Our own attention: its gradients in fp64, and torch's results for every shape of rows."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lorafit.ops import chunk_sizes as pieces
from lorafit.ops.causal_attention import causal_attention

Tensors = tuple[torch.Tensor, ...]


def draw(batch: int, heads: int, key_heads: int, tokens: int, dim: int, dtype: torch.dtype, wide: int = 0) -> Tensors:
    """q, k, v as views of linears' results, [batch, seq, heads x dim]."""
    torch.manual_seed(0)
    sizes = ((heads, dim), (key_heads, dim), (key_heads, wide or dim))
    drawn = (torch.randn(batch, tokens, n * d).to(dtype).view(batch, tokens, n, d).transpose(1, 2) for n, d in sizes)
    return tuple(tensor.requires_grad_() for tensor in drawn)


def run_both(tensors: Tensors, scale: float) -> tuple[Tensors, Tensors]:
    """Output and gradients of ours and of torch's."""
    ours = causal_attention(*tensors, scale)
    theirs = scaled_dot_product_attention(*tensors, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
    upstream = torch.randn(ours.shape).to(ours.dtype)
    return tuple((o.detach(), *torch.autograd.grad(o, tensors, upstream)) for o in (ours, theirs))  # type: ignore[return-value]


@pytest.mark.parametrize("shape", [(2, 4, 2, 7, 4), (1, 3, 1, 5, 2), (3, 2, 2, 4, 4)])
def test_gradients_hold_in_fp64(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "BLOCK_TOKENS", 3)
    monkeypatch.setattr("lorafit.ops.causal_attention.BLOCK_TOKENS", 3)
    monkeypatch.setattr(pieces, "CHUNK_TOKENS", 8)
    q, k, v = draw(*shape, torch.float64, wide=3)
    assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, 0.7), (q, k, v))


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=["all", "grouped", "one"])
@pytest.mark.parametrize("rows", [(1, 1), (1, 77), (5, 33), (3, 129), (2, 225), (40, 20), (1, 515)])
def test_it_is_torchs_in_fp32(rows: tuple[int, int], heads: tuple[int, int]) -> None:
    ours, theirs = run_both(draw(rows[0], *heads, rows[1], 16, torch.float32), 0.25)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [225, 1024])
def test_bf16_stays_within_rounding(tokens: int) -> None:
    """No further from the truth than torch's own, which computes its scores in fp32, by more than half."""
    narrow = draw(2, 6, 2, tokens, 64, torch.bfloat16)
    ours, theirs = run_both(narrow, 0.125)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in narrow)
    torch.manual_seed(0)
    draw(2, 6, 2, tokens, 64, torch.bfloat16)  # the generator stands where it stood before the upstream gradient
    truth, _ = run_both(exact, 0.125)
    for mine, other, right in zip(ours, theirs, truth, strict=True):
        distances = [float((found.double() - right).norm() / right.norm()) for found in (mine, other)]
        assert distances[0] < 1.5 * distances[1] + 5e-3 and distances[0] < 2e-2


def test_it_is_deterministic_and_keeps_its_operands_alone() -> None:
    kept: list[torch.Tensor] = []
    tensors = draw(2, 6, 2, 225, 16, torch.bfloat16)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = causal_attention(*tensors, 0.25)
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in tensors]
    upstream = torch.randn_like(output)
    first = torch.autograd.grad(output, tensors, upstream)
    again = causal_attention(*tensors, 0.25)
    assert torch.equal(output, again)
    assert all(map(torch.equal, first, torch.autograd.grad(again, tensors, upstream)))


def test_the_padding_behind_a_row_changes_nothing() -> None:
    """Right-padded rows need no mask: no real token looks at padding, and padding carries no gradient."""
    short = draw(1, 4, 2, 50, 16, torch.float32)
    padded = tuple(
        torch.cat([tensor.detach(), torch.randn(1, tensor.shape[1], 80, 16)], 2).requires_grad_() for tensor in short
    )
    output, whole = causal_attention(*short, 0.25), causal_attention(*padded, 0.25)
    assert torch.allclose(output, whole[:, :50], atol=1e-6)
    upstream = torch.randn_like(output)
    expected = torch.autograd.grad(output, short, upstream)
    found = torch.autograd.grad(whole[:, :50], padded, upstream)
    assert all(torch.allclose(a, b[:, :, :50], atol=1e-5) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 225, 1000])
def test_blocks_cover_a_row(tokens: int) -> None:
    blocks = pieces.cut_blocks(tokens)
    assert [position for block in blocks for position in range(block.start, block.stop)] == list(range(tokens))
    assert all(block.stop <= pieces.padded_keys(block) < block.stop + 32 for block in blocks)
    assert pieces.largest_block(tokens) == max((b.stop - b.start) * (-(-b.stop // 32) * 32) for b in blocks)
