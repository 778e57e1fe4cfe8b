"""DoRA: the direction of a frozen weight is trained by a low-rank update, the length of each of its rows by itself.

    V = W + (alpha / r) B A        W' = m V / ||V||        m [out]: one norm an output feature, at the start W's own

The gradient takes ||V|| for a constant, as the paper's section 4.3 proposes.

Source: Liu et al. 2024, DoRA (https://arxiv.org/abs/2402.09353), equation 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from lorafit.contracts import JsonValue
from lorafit.errors import ModelError
from lorafit.files.safetensors import row_blocks
from lorafit.kinds.adapters import adapters
from lorafit.kinds.adapters._low_rank import LowRank, LowRankFolding, LowRankSection
from lorafit.kinds.adapters._low_rank_fold import FP32_ROUNDOFF, LowRankFold
from lorafit.kinds.folding import AdaptedLayer

if TYPE_CHECKING:
    import torch

    from lorafit.facts import LinearShape


class DoraSection(LowRankSection):
    """Low-rank adapters beside frozen linears, with a trained norm for each output feature."""

    kind: Literal["dora"] = "dora"
    """DoRA."""


class DoraFolding(LowRankFolding):
    """Weights of a new direction, each output feature as long as the adapter says."""

    parts: ClassVar[Mapping[str, str]] = {**LowRankFolding.parts, "lora_magnitude_vector": "magnitude"}
    new_weight: ClassVar[str] = "m V / ||V||, V = W + s B A"

    def shape(self, layer: AdaptedLayer) -> tuple[int, int]:
        """LoRA's; the norms, `[out]`, are one for each output feature.

        Raises:
            ModelError: As LoRA's, or they are not.
        """
        found = super().shape(layer)
        norms, features = layer.tensors["magnitude"].elements, layer.tensors["B"].shape[0]
        if norms != features or layer.matrices != 1:
            raise ModelError(f"has {norms} norms for {features} output features", todo="get the adapter again")
        return found

    def fold(
        self, layer: AdaptedLayer, matrix: int, first_row: int, stop_row: int, read: Callable[[int, int], torch.Tensor]
    ) -> DoraFold:
        """m V / ||V||. A weight that lies `[in, out]` is read once before, for the norms of its columns.

        Raises:
            ModelError: It lies so, in several tensors.
        """
        left, right = self.factors(layer, matrix, first_row, stop_row)
        lengths, scaling = self.read(layer.tensors["magnitude"]).reshape(-1), self.scaling(layer)
        if not layer.transposed:
            return DoraFold(left, right, scaling, lengths[first_row:stop_row])
        if stop_row - first_row != self.shape(layer)[0]:
            raise ModelError("a DoRA weight that lies [in, out] cannot be merged where it is several tensors")
        scales = lengths.double() / _column_norms(left, right, scaling, read)
        return DoraFold(left, right, scaling, scales, of_columns=True)


def _column_norms(
    left: torch.Tensor, right: torch.Tensor, scaling: float, read: Callable[[int, int], torch.Tensor]
) -> torch.Tensor:
    """||V|| of each column, fp64."""
    import torch

    squares = torch.zeros(right.shape[1], dtype=torch.float64)
    for start, stop in row_blocks(len(left), right.shape[1]):
        changed = read(start, stop).double().addmm_(left[start:stop].double(), right.double(), alpha=scaling)
        squares += changed.square_().sum(dim=0)
    return squares.sqrt_()


class DoraFold(LowRankFold):
    """Gives the rows of V, or its columns, their lengths.

    Args:
        left: See `LowRankFold`.
        right: See `LowRankFold`.
        scaling: See `LowRankFold`.
        lengths: m of the rows; of a weight that lies `[in, out]`, m / ||V|| of the columns, fp64.
        of_columns: Whether it lies so.
    """

    def __init__(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        scaling: float,
        lengths: torch.Tensor,
        *,
        of_columns: bool = False,
    ) -> None:
        super().__init__(left, right, scaling)
        self._lengths, self._of_columns = lengths, of_columns

    def factors(self, columns: int | None) -> None:
        """None: rows get other lengths."""

    def finish(self, changed: torch.Tensor, first_row: int, bound: torch.Tensor | None = None) -> None:
        """Scales V in place; its errors grow with it, and the norm's own come from those of the row."""
        import torch

        scale, error = self._lengths, 4 * FP32_ROUNDOFF * torch.ones(1, 1)  # of two roundings, a division, a product
        if not self._of_columns:
            norms = torch.linalg.vector_norm(changed, dim=1, keepdim=True, dtype=torch.float64)
            scale = self._lengths[first_row : first_row + len(changed), None].double() / norms
            if bound is not None:
                error = error + bound.norm(dim=1, keepdim=True) / norms.float()
        changed.mul_(scale.to(changed.dtype))
        if bound is not None:
            bound.mul_(scale.abs().float()).add_(changed.abs().float().mul_(error))


@adapters.register(DoraSection)
class Dora(LowRank[DoraSection]):
    """PEFT's DoRA."""

    peft_options: ClassVar[Mapping[str, JsonValue]] = {"use_dora": True}
    folds: ClassVar[type[LowRankFolding]] = DoraFolding

    def layer_parameters(self, linear: LinearShape, rank: int) -> int:
        """LoRA's, and a norm for each output feature."""
        return super().layer_parameters(linear, rank) + linear.out_features
