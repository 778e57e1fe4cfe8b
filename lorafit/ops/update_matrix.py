"""What an adapter adds to one weight, measured: norms, effective rank, direction; by its factors where it has some.

    low rank   left [rows, r] @ right [r, columns]     QR of both and the values of an [r, r]: no dense matrix
    dense      left [rows, columns] itself             eigenvalues of its Gram matrix on the smaller side

Effective rank: exp of the entropy of the singular values' shares, exp(-sum p ln p) with p = s / sum s: r where r values
are equal, near 1 where one outweighs all (Roy and Vetterli 2007, "The effective rank", EUSIPCO, section 2).

Subspace overlap of two updates: ||U1[:, :i]^T U2[:, :j]||_F^2 / min(i, j), 0 to 1, U their singular vectors
(Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685, section 7.2, equation 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

MOST_SIDE = 2048
"""Smaller side of a dense update whose singular values are computed: that of the next size takes a minute a module."""
SAME_DIRECTION = 0.999
"""Least |cosine| of two modules' updates that count as one direction."""
SAME_RANK = 0.99
"""The same of two ranks within one module: of s b_i a_i^T and s b_j a_j^T."""
_SKETCH = 24  # random directions on either side that stand for an update: 576 numbers
_LIKELY = 0.95
"""Least |cosine| of two images whose updates are compared themselves: the images of one direction have more."""
_SEED = 7


@dataclass(frozen=True)
class UpdateMatrix:
    """One update, fp64.

    Attributes:
        left: `[rows, r]`; the whole matrix where `right` is None.
        right: `[r, columns]`.
    """

    left: torch.Tensor
    right: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    @property
    def rank(self) -> int:
        """The most that it can have."""
        return min(self.shape) if self.right is None else self.left.shape[1]

    @cached_property
    def norm(self) -> float:
        """Frobenius."""
        return math.sqrt(max(self.inner(self), 0.0))

    def inner(self, other: UpdateMatrix) -> float:
        """Sum of the products of their values: <s B A, s' B' A'> = sum of (B^T B') * (A A'^T) s s'."""
        if self.right is not None and other.right is not None:
            return float(((self.left.t() @ other.left) * (self.right @ other.right.t())).sum())
        return float((self.dense() * other.dense()).sum())

    def cosine(self, other: UpdateMatrix) -> float | None:
        """Of the angle between them, -1 to 1; None where one is zero."""
        lengths = self.norm * other.norm
        return max(-1.0, min(1.0, self.inner(other) / lengths)) if lengths else None

    def products_of_ranks(self) -> torch.Tensor:
        """Inner products of the updates that its ranks are, `[r, r]`."""
        assert self.right is not None, "a dense one has no ranks"
        return (self.left.t() @ self.left) * (self.right @ self.right.t())

    def dense(self) -> torch.Tensor:
        """`[rows, columns]`."""
        return self.left if self.right is None else self.left @ self.right

    @cached_property
    def singular(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Left vectors in columns, values, right vectors in columns; None of a dense one that is too large."""
        if self.right is not None:
            return singular_of_product(self.left, self.right)
        rows, columns = self.shape
        if min(rows, columns) > MOST_SIDE:
            return None
        narrow = self.left if rows <= columns else self.left.t()
        squares, vectors = torch.linalg.eigh(narrow @ narrow.t())
        values, vectors = squares.clamp(min=0.0).sqrt().flip(0), vectors.flip(1)
        others = (narrow.t() @ vectors) / values.clamp(min=torch.finfo(values.dtype).tiny)
        return (vectors, values, others) if rows <= columns else (others, values, vectors)

    @property
    def spectral_norm(self) -> float | None:
        """The largest singular value; None where they are not computed."""
        return None if self.singular is None else float(self.singular[1][0])

    @property
    def effective_rank(self) -> float | None:
        """1 to `rank`; 0 of zeros, None where singular values are not computed."""
        if self.singular is None:
            return None
        values = self.singular[1]
        shares = values[values > 0] / values.sum()
        return float(torch.exp(-(shares * shares.log()).sum())) if len(shares) else 0.0

    def overlap(self, other: UpdateMatrix) -> tuple[float, float] | None:
        """Of what both read (right vectors) and write (left vectors), with as many of each as its effective rank says.

        None where one is zero, or singular values are not computed.
        """
        if not (self.effective_rank and other.effective_rank and self.singular and other.singular):
            return None
        i, j = (max(1, round(each)) for each in (self.effective_rank, other.effective_rank))
        pairs = ((self.singular[side], other.singular[side]) for side in (2, 0))
        reads, writes = (float((u[:, :i].t() @ v[:, :j]).square().sum()) / min(i, j) for u, v in pairs)
        return reads, writes

    def trace(self) -> UpdateMatrix:
        """What is kept of it to find its direction again: fp32 factors; of a dense one its image."""
        if self.right is None:
            return UpdateMatrix(self.image().float())
        return UpdateMatrix(self.left.float(), self.right.float())

    def image(self) -> torch.Tensor:
        """What it makes of random directions, `[24, 24]`.

        Inner products of images are those of the matrices but for a share of about 1 / 24 of the lengths, and two
        matrices of one direction have images of one direction.
        """
        draw, (rows, columns), dtype = torch.Generator().manual_seed(_SEED), self.shape, self.left.dtype
        before = torch.randn(_SKETCH, rows, generator=draw, dtype=torch.float64).to(dtype)
        behind = torch.randn(columns, _SKETCH, generator=draw, dtype=torch.float64).to(dtype)
        return before @ self.left @ (behind if self.right is None else self.right @ behind)


def singular_of_product(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left vectors in columns, values and right vectors in columns of left @ right, which is not made."""
    (q, r), (p, t) = torch.linalg.qr(left), torch.linalg.qr(right.t())
    u, values, v = torch.linalg.svd(r @ t.t(), full_matrices=False)
    return q @ u, values, p @ v.t()


def same_directions(
    traces: Mapping[str, UpdateMatrix], shapes: Mapping[str, tuple[int, int]]
) -> tuple[list[tuple[str, str]], dict[str, list[tuple[int, int]]]]:
    """Pairs of updates with one direction, and pairs of ranks with one direction by their module.

    Args:
        traces: Of updates that are not zero, by module.
        shapes: Of the updates themselves; only those of one shape can have one direction.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, trace in traces.items():
        groups.setdefault((shapes[name], trace.right is None), []).append(name)
    modules: list[tuple[str, str]] = []
    ranks: dict[str, list[tuple[int, int]]] = {}
    for (_, is_dense), names in groups.items():
        images = torch.stack([(traces[name].left if is_dense else traces[name].image()).flatten() for name in names])
        alike = _pairs(images @ images.t(), SAME_DIRECTION if is_dense else _LIKELY)
        for one, other in ((names[i], names[j]) for i, j in alike):
            if is_dense or abs(traces[one].cosine(traces[other]) or 0.0) >= SAME_DIRECTION:
                modules.append((one, other))
        for name in names if not is_dense else ():
            if found := _pairs(traces[name].products_of_ranks(), SAME_RANK):
                ranks[name] = found
    return modules, ranks


def _pairs(products: torch.Tensor, least: float) -> list[tuple[int, int]]:
    """Numbers of those whose cosine is so far from 0, by their inner products; of zeros none."""
    lengths = products.diagonal().clamp(min=0.0).sqrt()
    whole = lengths > 0
    cosines = products / torch.where(whole, lengths, 1.0) / torch.where(whole, lengths, 1.0)[:, None]
    found = (cosines.abs() >= least) & whole & whole[:, None]
    return [(i, j) for i, j in found.triu(1).nonzero().tolist()]
