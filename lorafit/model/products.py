"""Updates of linears as products B A of two narrow matrices, in fp64, summed and cut to a smaller rank.

The k largest singular values with their vectors are the update of rank k that is closest, and what is left out is the
root of the sum of the other values' squares (Eckart and Young 1936). No matrix of a weight's size is made for them.

Of a dense update D they are the eigenvectors of the smaller of D D^T and D^T D; where that is large, those of a random
subspace that D is multiplied with a few times (Halko et al. 2011, https://arxiv.org/abs/0909.4061, algorithm 4.4): near
the closest, and what they leave out is computed and not guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from lorafit.ops.update_matrix import singular_of_product

MOST_SIDE = 2048
"""Smaller side of a dense update whose every direction is computed: that of the next size takes a minute a layer."""
_MORE_DIRECTIONS, _TIMES, _SEED = 16, 4, 7


@dataclass(frozen=True, slots=True)
class LayerError:
    """What a smaller rank leaves out of one layer's update.

    Attributes:
        layer: Its path.
        error: Frobenius norm of the difference.
        update: That of the whole update.
    """

    layer: str
    error: float
    update: float

    @property
    def share(self) -> float:
        """error / update, 0 to 1."""
        return self.error / self.update if self.update else 0.0


def share_of_all(errors: Sequence[LayerError]) -> float:
    """Norm of what all layers lose over that of all updates."""
    lost, whole = (sum(getattr(one, name) ** 2 for one in errors) for name in ("error", "update"))
    return float((lost / whole) ** 0.5) if whole else 0.0


class Product:
    """One layer's update B A, its scale in B.

    Args:
        a: `[r, in]`, fp64.
        b: `[out, r]`, fp64.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.a, self.b, self.rank = a, b, a.shape[0]

    @classmethod
    def sum_of(cls, products: Sequence[Product], weights: Sequence[float]) -> Product:
        """The weighted sum, exact: factors side by side, each B times its weight."""
        scaled = [product.b * weight for product, weight in zip(products, weights, strict=True)]
        return cls(torch.cat([product.a for product in products]), torch.cat(scaled, dim=1))

    @classmethod
    def closest_to(cls, update: torch.Tensor, rank: int | float) -> tuple[Product, float]:
        """The closest of a rank to a dense update `[out, in]`, fp64, and how far it is: B = U_k, A = U_k^T D.

        Args:
            update: D.
            rank: k; or as a share, such as 0.01, the smallest that leaves out no more of D's norm.
        """
        if update.shape[0] > update.shape[1]:
            flipped, error = cls.closest_to(update.T, rank)
            return cls(flipped.b.T.contiguous(), flipped.a.T.contiguous()), error
        vectors, squares = leading_vectors(update, rank)
        if isinstance(rank, float):
            left_out = float(update.square().sum()) - squares.cumsum(0)  # [k]: of the values behind k
            rank = 1 + int((left_out > (rank * update.norm()) ** 2).sum())
        b = vectors[:, : min(rank, len(update))]
        a = b.T @ update
        return cls(a, b.contiguous()), float(torch.addmm(update, b, a, alpha=-1).norm())

    @cached_property
    def _singular(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Left vectors, values, right vectors."""
        left, values, right = singular_of_product(self.b, self.a)
        return left, values, right.t()

    def closest(self, rank: int) -> tuple[Product, float]:
        """The closest of that rank, and how far it is."""
        left, values, right = self._singular
        root = values[:rank].sqrt()
        return Product(root[:, None] * right[:rank], left[:, :rank] * root), float(values[rank:].norm())

    def rank_within(self, share: float) -> int:
        """The smallest rank from 1 that leaves out no more than that share of the update's norm."""
        squares = self._singular[1].square()
        left_out = squares.flip(0).cumsum(0).flip(0)  # [k]: of the values from k on
        return max(1, int((left_out > share**2 * left_out[0]).sum()))

    def padded(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A `[rank, in]` and B `[out, rank]`, filled up with zeros."""
        more, pad = rank - self.rank, torch.nn.functional.pad
        return pad(self.a, (0, 0, 0, more)).contiguous(), pad(self.b, (0, more)).contiguous()

    def dense(self) -> torch.Tensor:
        """`[out, in]`."""
        return self.b @ self.a

    @cached_property
    def norm(self) -> float:
        """Frobenius."""
        return float(self._singular[1].norm())


def leading_vectors(update: torch.Tensor, rank: int | float) -> tuple[torch.Tensor, torch.Tensor]:
    """Left singular vectors of a wide update in columns, the largest first, and squares of their values; as many as a
    rank or a share wants, or more.
    """
    side, whole = len(update), float(update.square().sum())
    count = rank + _MORE_DIRECTIONS if isinstance(rank, int) else MOST_SIDE // 16
    while side > MOST_SIDE and count < side // 4:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            vectors, values, _ = torch.svd_lowrank(update, q=count, niter=_TIMES)
        if isinstance(rank, int) or whole - float(values.square().sum()) <= rank**2 * whole:
            return vectors, values.square()
        count *= 2
    squares, vectors = torch.linalg.eigh(update @ update.T)
    return vectors.flip(1), squares.clamp(min=0.0).flip(0)
