"""W + s * B A in fp32 and its proof in fp64, on so few values at a time that a core's own cache holds them.

Source of the bound: Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafit.files.safetensors import row_blocks

if TYPE_CHECKING:
    import torch

_CACHED_ELEMENTS = 64 * 1024
"""Values worked on at a time: 0.25 MiB in fp32, 0.5 MiB in fp64."""
_UNIT_ROUNDOFF = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24, "F64": 2.0**-53}
_SMALLEST = {"BF16": 2.0**-126, "F16": 2.0**-24, "F32": 2.0**-126, "F64": 2.0**-126}
"""Of a dtype, or of the fp32 that is added in: its smallest normal number, below which relative bounds end."""


@dataclass(frozen=True)
class Factors:
    """What is added to a weight: scaling * left @ right.

    Attributes:
        left: `[rows, r]`, fp32.
        right: `[r, columns]`, fp32.
    """

    left: torch.Tensor
    right: torch.Tensor
    scaling: float


class Addition:
    """Adds an update to a weight's rows. Holds the memory for it."""

    def __init__(self, factors: Factors) -> None:
        import torch

        self._factors = factors
        width = factors.right.shape[1]
        self._wide = torch.empty(max(width, _CACHED_ELEMENTS))

    def add(self, weight: torch.Tensor, first: int, out: torch.Tensor) -> None:
        """`out` becomes weight + update, added in fp32 and rounded once.

        Args:
            weight: Rows `first` and following, any float dtype: `[n, columns]`.
            first: Number of the first row.
            out: The result in the dtype that is written; may be `weight` itself.
        """
        left, right = self._factors.left[first : first + len(weight)], self._factors.right
        for start, stop in row_blocks(*weight.shape, elements=_CACHED_ELEMENTS):
            wide = self._wide[: (stop - start) * weight.shape[1]].view(stop - start, -1)
            wide.copy_(weight[start:stop]).addmm_(left[start:stop], right, alpha=self._factors.scaling)
            out[start:stop].copy_(wide)


class Proof:
    """Compares what was written with W + s * B A in fp64.

    |written - exact| <= u |exact| + (r + 2) 2^-24 (|W| + s |B_i| |A_j|) + smallest, u the dtype's unit roundoff: one
    rounding to the dtype, and the rounding errors of an fp32 product of r terms and a sum. The difference is taken in
    fp64; the bound, of which three digits would do, in fp32.

    Args:
        factors: The update.
        dtype: safetensors' name of what was written.
    """

    def __init__(self, factors: Factors, dtype: str) -> None:
        import torch

        self._left, self._right, self._scaling = factors.left.double(), factors.right.double(), factors.scaling
        self._left_norms = (self._left.norm(dim=1) * abs(factors.scaling)).float()[:, None]
        self._right_norms = self._right.norm(dim=0).float()[None]
        self._product_error = (self._right.shape[0] + 2) * 2.0**-24
        self._roundoff, self._smallest = _UNIT_ROUNDOFF[dtype], _SMALLEST[dtype]
        size = max(self._right.shape[1], _CACHED_ELEMENTS)
        self._exact, self._written = torch.empty(2, size, dtype=torch.float64)
        self._bound, self._error = torch.empty(2, size)

    def compare(self, weight: torch.Tensor, written: torch.Tensor, first: int) -> float:
        """The largest |written - exact| over its bound, of rows `first` and following; NaN where one is."""
        worst = 0.0
        for start, stop in row_blocks(*weight.shape, elements=_CACHED_ELEMENTS):
            found = self._compare(weight[start:stop], written[start:stop], first + start)
            if not found <= 1.0:  # NaN as well
                return found
            worst = max(worst, found)
        return worst

    def _compare(self, weight: torch.Tensor, written: torch.Tensor, first: int) -> float:
        buffers = (self._exact, self._written, self._bound, self._error)
        exact, got, bound, error = (buffer[: weight.numel()].view(weight.shape) for buffer in buffers)
        rows = slice(first, first + len(weight))
        exact.copy_(weight).addmm_(self._left[rows], self._right, alpha=self._scaling)
        share = self._product_error
        bound.copy_(weight).abs_().addmm_(self._left_norms[rows], self._right_norms, beta=share, alpha=share)
        bound.add_(error.copy_(exact).abs_(), alpha=self._roundoff).add_(self._smallest)
        return float(error.copy_(exact.sub_(got.copy_(written))).abs_().div_(bound).max())
