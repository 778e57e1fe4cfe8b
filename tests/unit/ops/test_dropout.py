"""A thread's own dropout is torch's, from another generator."""

from __future__ import annotations

import pytest
import torch

from lorafit.ops.dropout import draw_seed, drawing_from, drop

X = torch.arange(1.0, 4097.0).reshape(64, 64)


def test_outside_it_is_torch_dropout() -> None:
    torch.manual_seed(3)
    expected = torch.nn.functional.dropout(X, 0.3)
    torch.manual_seed(3)
    assert torch.equal(drop(X, 0.3), expected)


def test_a_seed_gives_the_numbers_that_torch_gives_for_it_and_leaves_torchs_alone() -> None:
    torch.manual_seed(5)
    expected = torch.nn.functional.dropout(X, 0.3)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with drawing_from(5):
        found = drop(X, 0.3)
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), before)


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
