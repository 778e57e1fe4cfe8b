"""Figures of an update are those of its dense matrix, by numpy's SVD; planted directions are found again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorafit.ops import update_matrix
from lorafit.ops.update_matrix import UpdateMatrix, same_directions


def factors(rows: int, columns: int, rank: int, seed: int) -> UpdateMatrix:
    draw = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=draw, dtype=torch.float64) * torch.logspace(0, -2, rank)
    return UpdateMatrix(left, torch.randn(rank, columns, generator=draw, dtype=torch.float64))


def entropy_rank(matrix: np.ndarray) -> float:
    """Roy and Vetterli 2007, definition 1."""
    values = np.linalg.svd(matrix, compute_uv=False)
    shares = values[values > 1e-12 * values[0]] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


SHAPES = [(30, 50, 6), (50, 30, 6), (20, 8, 12)]


@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
@pytest.mark.parametrize("is_dense", [False, True])
def test_figures_are_those_of_the_dense_matrix(rows: int, columns: int, rank: int, is_dense: bool) -> None:
    low = factors(rows, columns, rank, 1)
    matrix = UpdateMatrix(low.dense()) if is_dense else low
    dense = low.dense().numpy()
    assert matrix.norm == pytest.approx(np.linalg.norm(dense), rel=1e-9)
    assert matrix.spectral_norm == pytest.approx(np.linalg.norm(dense, 2), rel=1e-9)
    assert matrix.effective_rank == pytest.approx(entropy_rank(dense), rel=1e-5)
    assert (matrix.shape, matrix.rank) == ((rows, columns), min(rows, columns) if is_dense else rank)


@pytest.mark.parametrize("dense_sides", [(), (0,), (1,), (0, 1)])
def test_two_updates_are_compared_as_their_dense_matrices_are(dense_sides: tuple[int, ...]) -> None:
    low = [factors(30, 50, rank, seed) for seed, rank in ((1, 4), (2, 6))]
    one, two = (UpdateMatrix(m.dense()) if side in dense_sides else m for side, m in enumerate(low))
    a, b = (m.dense().numpy() for m in low)
    assert one.cosine(two) == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-12)
    assert one.cosine(one) == pytest.approx(1.0)
    i, j = round(entropy_rank(a)), round(entropy_rank(b))
    (u, _, v), (w, _, x) = (np.linalg.svd(m, full_matrices=False) for m in (a, b))
    expected = [
        np.linalg.norm(left.T @ right) ** 2 / min(i, j) for left, right in ((v[:i].T, x[:j].T), (u[:, :i], w[:, :j]))
    ]
    assert one.overlap(two) == pytest.approx(expected, abs=1e-6)
    assert one.overlap(one) == pytest.approx((1.0, 1.0))


def test_nothing_is_said_of_zeros_and_of_matrices_that_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = UpdateMatrix(torch.zeros(4, 2, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64))
    some = factors(4, 5, 2, 1)
    assert (zero.norm, zero.effective_rank, zero.cosine(some), zero.overlap(some)) == (0.0, 0.0, None, None)
    monkeypatch.setattr(update_matrix, "MOST_SIDE", 3)
    large = UpdateMatrix(some.dense())
    assert (large.spectral_norm, large.effective_rank, large.overlap(some)) == (None, None, None)
    assert large.norm == pytest.approx(some.norm) and some.spectral_norm is not None


@pytest.mark.parametrize("is_dense", [False, True])
def test_updates_of_one_direction_are_found(is_dense: bool) -> None:
    low = {name: factors(30, 50, 4, seed) for seed, name in enumerate("abcd")}
    low["copy"] = UpdateMatrix(low["b"].left @ torch.diag(torch.tensor([-3.0] * 4).double()), low["b"].right)
    low["wide"] = factors(30, 60, 4, 1)
    shapes = {name: m.shape for name, m in low.items()}
    kept = {name: (UpdateMatrix(m.dense()) if is_dense else m).trace() for name, m in low.items()}
    assert same_directions(kept, shapes) == ([("b", "copy")], {})


def test_what_is_alike_among_many_is_found_in_little_memory() -> None:
    """No tensor grows with the square of all ranks together: 40,960 of them took 7 GB."""
    found = {str(seed): factors(20, 24, 12, seed).trace() for seed in range(40)}
    found["7"] = UpdateMatrix(-2 * found["31"].left, found["31"].right)
    found["8"] = UpdateMatrix(found["31"].left + 0.2 * found["9"].left, found["31"].right)  # a cosine of 0.98
    sizes: list[int] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            sizes.extend(
                one.numel() for one in (made if isinstance(made, tuple | list) else [made]) if hasattr(one, "numel")
            )
            return made

    with Watching():
        assert same_directions(found, dict.fromkeys(found, (20, 24))) == ([("7", "31")], {})
    assert max(sizes) <= 40 * 24 * 24 < (40 * 12) ** 2


def test_ranks_of_one_direction_are_found_within_their_module() -> None:
    one, other = factors(30, 50, 4, 1), factors(30, 50, 3, 2)
    assert one.right is not None
    one.left[:, 3], one.right[3] = 2 * one.left[:, 1], -one.right[1]
    found = same_directions({"one": one.trace(), "other": other.trace()}, {"one": (30, 50), "other": (30, 50)})
    assert found == ([], {"one": [(1, 3)]})
