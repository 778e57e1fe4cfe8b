"""A dense update at a rank: as close as numpy's SVD, exactly where it is small, and nearly where it is large."""

from __future__ import annotations

import pytest
import torch

from lorafit.model import products
from lorafit.model.products import Product


def dense(rows: int, columns: int, decay: float) -> torch.Tensor:
    """Singular values 1, decay, decay^2, ..."""
    draw = torch.Generator().manual_seed(5)
    left, right = (torch.randn(side, min(rows, columns), generator=draw).double() for side in (rows, columns))
    values = decay ** torch.arange(min(rows, columns)).double()
    return torch.linalg.qr(left)[0] * values @ torch.linalg.qr(right)[0].T


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
@pytest.mark.parametrize("most_side", [2048, 40])
def test_a_rank_and_a_share_are_the_closest_there_are(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], most_side: int
) -> None:
    monkeypatch.setattr(products, "MOST_SIDE", most_side)
    monkeypatch.setattr(products, "_MORE_DIRECTIONS", 4)
    update = dense(*shape, 0.9)
    values = torch.linalg.svdvals(update)
    for rank in (1, 6, 60, 100):
        kept, error = Product.closest_to(update, rank)
        assert kept.rank == min(rank, 60)
        assert error == pytest.approx(float(values[rank:].norm()), rel=1e-3, abs=1e-12)
        assert float((kept.dense() - update).norm()) == pytest.approx(error, abs=1e-12)
    for share in (0.5, 0.3, 0.01):
        kept, error = Product.closest_to(update, share)
        least = 1 + int((values.square().flip(0).cumsum(0).sqrt().flip(0)[1:] > share * values.norm()).sum())
        assert least <= kept.rank <= least + 1 and error <= share * float(update.norm())


def test_a_large_update_is_cut_without_all_its_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """All directions of 4,096 outputs take minutes a layer; the draw is the same each time and nobody else's."""
    monkeypatch.setattr(products, "MOST_SIDE", 100)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    update = dense(200, 300, 0.98)
    state = torch.get_rng_state()
    (one, error), (other, _) = Product.closest_to(update, 16), Product.closest_to(update, 16)
    assert torch.equal(one.b, other.b) and torch.equal(torch.get_rng_state(), state)
    assert error == pytest.approx(float(torch.linalg.svdvals(update)[16:].norm()), rel=1e-4)
