"""W + s * B A in fp32 and its proof in fp64, on so few values at a time that a core's own cache holds them.

    |written - exact| <= u |exact| + (r + 2) 2^-24 (|W| + s |B_i| |A_j|) + smallest        u: the dtype's unit roundoff

One rounding to the dtype, and the rounding errors of an fp32 product of r terms and a sum. The difference is taken in
fp64; the bound, of which three digits would do, in fp32.

Source of the bound: Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.5.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from lorafit.files.safetensors import row_blocks
from lorafit.kinds.folding import Fold

if TYPE_CHECKING:
    import torch

_CACHED_ELEMENTS = 64 * 1024
"""Values worked on at a time: 0.25 MiB in fp32, 0.5 MiB in fp64."""
FP32_ROUNDOFF = 2.0**-24
_FP32_SMALLEST = 2.0**-126


class LowRankFold(Fold):
    """Adds s * B A to a weight's rows.

    Args:
        left: `[rows, r]`, fp32: B, or A transposed.
        right: `[r, columns]`, fp32.
        scaling: s.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
        self._left, self._right, self.scaling = left, right, scaling

    def apply(self, weight: torch.Tensor, first_row: int, out: torch.Tensor) -> None:
        """`out` becomes the changed weight; see `Fold`."""
        import torch

        buffer = torch.empty(max(weight.shape[1], _CACHED_ELEMENTS))
        for start, stop in row_blocks(*weight.shape, elements=_CACHED_ELEMENTS):
            wide = buffer[: (stop - start) * weight.shape[1]].view(stop - start, -1)
            left = self._left[first_row + start : first_row + stop]
            wide.copy_(weight[start:stop]).addmm_(left, self._right, alpha=self.scaling)
            self.finish(wide, first_row + start)
            out[start:stop].copy_(wide)

    def error(self, weight: torch.Tensor, written: torch.Tensor, first_row: int) -> float:
        """The largest error over its bound; see `Fold`."""
        worst = 0.0
        for start, stop in row_blocks(*weight.shape, elements=_CACHED_ELEMENTS):
            found = self._error(weight[start:stop], written[start:stop], first_row + start)
            if not found <= 1.0:  # NaN as well
                return found
            worst = max(worst, found)
        return worst

    def update(self, weight: torch.Tensor, first_row: int) -> torch.Tensor:
        """s * B A, or what a method makes of the sum, less W; see `Fold`."""
        wide, rows = weight.double(), slice(first_row, first_row + len(weight))
        changed = wide.addmm(self._left[rows].double(), self._right.double(), alpha=self.scaling)
        self.finish(changed, first_row)
        return changed.sub_(wide)

    def factors(self, columns: int | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """s B and A; see `Fold`."""
        return self._left.double() * self.scaling, self._right.double()

    def finish(self, changed: torch.Tensor, first_row: int, bound: torch.Tensor | None = None) -> None:
        """Makes the result of W + s * B A, in place, where a method does more with it.

        Args:
            changed: Some rows of the sum, fp32 or fp64.
            first_row: The first of them.
            bound: Bounds of the sum's errors, to be made the result's.
        """

    def _error(self, weight: torch.Tensor, written: torch.Tensor, first_row: int) -> float:
        import torch

        left, right, left_norms, right_norms, buffers = self._proof
        exact, got, bound, error = (buffer[: weight.numel()].view(weight.shape) for buffer in buffers)
        rows = slice(first_row, first_row + len(weight))
        exact.copy_(weight).addmm_(left[rows], right, alpha=self.scaling)
        share = (right.shape[0] + 2) * FP32_ROUNDOFF
        bound.copy_(weight).abs_().addmm_(left_norms[rows], right_norms, beta=share, alpha=share)
        self.finish(exact, first_row, bound)
        limits = torch.finfo(written.dtype)
        smallest = max(limits.smallest_normal * limits.eps, _FP32_SMALLEST)  # below it relative bounds end
        bound.add_(error.copy_(exact).abs_(), alpha=limits.eps / 2).add_(smallest)
        return float(error.copy_(exact.sub_(got.copy_(written))).abs_().div_(bound).max())

    @cached_property
    def _proof(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Both factors in fp64, norms of their rows and columns in fp32, and memory for four blocks."""
        import torch

        left, right = self._left.double(), self._right.double()
        left_norms = (left.norm(dim=1) * abs(self.scaling)).float()[:, None]
        size = max(right.shape[1], _CACHED_ELEMENTS)
        buffers = (*torch.empty(2, size, dtype=torch.float64), *torch.empty(2, size))
        return left, right, left_norms, right.norm(dim=0).float()[None], buffers
