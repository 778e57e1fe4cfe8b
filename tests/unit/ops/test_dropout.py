"""Dropout on a CPU: its distribution, its seeds, its gradient."""

from __future__ import annotations

import pytest
import torch

from lorafit.ops.dropout import draw_seed, drawing_from, drop

X = torch.arange(1.0, 4097.0).reshape(64, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_drops_at_the_probability_and_keeps_the_mean(dtype: torch.dtype) -> None:
    x = torch.ones(1001, 999, dtype=dtype)  # no multiple of four values
    torch.manual_seed(3)
    dropped = drop(x, 0.3)
    assert dropped.dtype == dtype and dropped.shape == x.shape
    share = (dropped == 0).float()
    assert float(share.mean()) == pytest.approx(0.3, abs=0.002)  # over four standard errors
    zero, kept = dropped.unique().tolist()
    assert zero == 0.0 and kept == pytest.approx(1 / 0.7, rel=4e-3 if dtype == torch.bfloat16 else 1e-4)
    flat = share.flatten()[: 1001 * 999 // 4 * 4].reshape(-1, 4)
    assert flat.mean(0).tolist() == pytest.approx([0.3] * 4, abs=0.004)  # each quarter of a word
    assert abs(float(torch.corrcoef(flat.T).fill_diagonal_(0).abs().max())) < 0.01


def test_it_falls_as_torchs_does() -> None:
    """The same distribution of how many of a row's values go: mean and variance of a binomial."""
    torch.manual_seed(0)
    x = torch.ones(4000, 576)
    ours, torchs = ((y == 0).sum(1).float() for y in (drop(x, 0.05), torch.nn.functional.dropout(x, 0.05)))
    assert float(ours.mean()) == pytest.approx(float(torchs.mean()), rel=0.02)
    assert float(ours.var()) == pytest.approx(float(torchs.var()), rel=0.1)


def test_each_call_follows_torchs_generator() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = drop(X, 0.3), drop(X, 0.3)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)  # as checkpointing does before it computes again
    assert torch.equal(drop(X, 0.3), first)
    assert torch.equal(drop(X, 0.3), second)


def test_a_seed_gives_the_same_numbers_and_leaves_torchs_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    found = []
    for seed in (5, 5, 6):
        with drawing_from(seed):
            found.append((drop(X, 0.3), drop(X, 0.3)))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][0], found[0][1]) and not torch.equal(found[0][0], found[2][0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("probability", [0.0, 1e-7])
def test_none_is_dropped_where_the_probability_is_nothing(probability: float) -> None:
    assert torch.equal(drop(X, probability), X)


def test_the_gradient_passes_where_the_value_did() -> None:
    x = X.clone().requires_grad_()
    with drawing_from(1):
        y = drop(x, 0.25)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.where(y == 0, 0.0, 1 / 0.75))
    assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.03)


def test_seeds_follow_torchs_generator() -> None:
    torch.manual_seed(11)
    first = [draw_seed() for _ in range(3)]
    torch.manual_seed(11)
    assert [draw_seed() for _ in range(3)] == first
    assert len(set(first)) == 3
