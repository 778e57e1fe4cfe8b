"""What initialisations share: the layers, their weights, PEFT's own arithmetic beside one of them, and filling them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from lorafit.kinds.initialisations import Initialisation, InitialisationSection
from lorafit.kinds.quantizations import kind_of_codes
from lorafit.kinds.registry import S_co

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from lorafit.facts import LinearShape

FP32_BYTES = 4


@dataclass(frozen=True)
class FreshLayer:
    """One LoRA layer of a fresh adapter.

    Attributes:
        path: Its linear's in the base.
        peft: PEFT's layer.
        name: The adapter's.
    """

    path: str
    peft: Any
    name: str

    @property
    def rank(self) -> int:
        """Of what is trained."""
        factor = self.peft.lora_A[self.name]
        return len(getattr(factor, "trained", factor.weight))

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return float(self.peft.scaling[self.name])

    def weight(self) -> torch.Tensor:
        """The base's weight as the model computes with it, a copy: `[out, in]`, fp32."""
        base = self.peft.get_base_layer()
        codes = kind_of_codes(base)
        if codes is not None:
            return codes.unpack(base).float()
        weight: torch.Tensor = base.weight.detach()
        return (weight.t() if self.peft.fan_in_fan_out else weight).float().clone()

    def peft_factors(self, weight: torch.Tensor, kind: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B that one of PEFT's initialisations makes of a weight, whatever the base is stored as.

        Args:
            weight: `[out, in]`, fp32; PEFT takes the part out of it.
            kind: PEFT's `init_lora_weights`.
        """
        from peft import LoraConfig
        from peft.tuners.lora import Linear
        from torch import nn

        rows, columns = weight.shape
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        alpha: Any = self.scaling * self.rank  # PEFT's type says int, and its own arithmetic divides
        config = LoraConfig(r=self.rank, lora_alpha=alpha, init_lora_weights=kind)
        made: Any = Linear(linear, "start", config=config, r=self.rank, lora_alpha=alpha)
        return made.lora_A["start"].weight.detach(), made.lora_B["start"].weight.detach()

    def fill_product(self, u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor) -> None:
        """First values whose product is U S V^T `[out, r] [r] [r, in]`, the root of S on each side."""
        root = (s / self.scaling).sqrt()
        self.fill(root[:, None] * vh, u * root)

    def fill(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """First values; of a layer that is corrected, its held half takes them out again."""
        import torch

        from lorafit.ops.corrected_factor import CorrectedFactor

        for factor, first, held, dim in (
            (self.peft.lora_A[self.name], a, a, 0),
            (self.peft.lora_B[self.name], b, -b, 1),
        ):
            if isinstance(factor, CorrectedFactor):
                factor.take(torch.cat([first, held], dim))
            else:
                factor.weight.data.copy_(first)
        if self.name in getattr(self.peft, "lora_magnitude_vector", {}):
            self._fill_norms(self.peft.lora_magnitude_vector[self.name])

    def _fill_norms(self, dora: Any) -> None:
        """DoRA's norms of what the weight is with its new A and B; PEFT has taken them before."""
        norms, factors = dora.weight, (self.peft.lora_A[self.name].weight, self.peft.lora_B[self.name].weight)
        dora.update_layer(
            base_layer=self.peft.get_base_layer(), lora_A=factors[0], lora_B=factors[1], scaling=self.scaling
        )
        norms.data.copy_(dora.weight)
        dora.weight = norms


def fresh_layers(model: PeftModel) -> Iterator[FreshLayer]:
    """The LoRA layers of a model's adapter, in the model's order."""
    from peft.tuners.lora import LoraLayer

    name = str(model.active_adapter)
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            yield FreshLayer(path, module, name)


class DecomposedSection(InitialisationSection):
    """The section of a method that needs the largest singular values alone."""

    iterations: int | None = Field(default=None, ge=0, le=64)
    """Subspace iterations of a randomised decomposition, e.g. 16: much faster on large weights; null: an exact one."""


class Decomposing(Initialisation[S_co]):
    """One that begins with some of a matrix's singular values, or rows of its QR: their number bounds the rank."""

    matrices: ClassVar[int] = 5
    """Matrices of the size of a linear's weight that are there at once, in fp32: it, and what it is decomposed to."""

    def why_not_rank(self, rank: int, linear: LinearShape) -> str | None:
        """A matrix has no more singular values than rows or columns."""
        most = min(linear.in_features, linear.out_features)
        name = f"{linear.name} [{linear.out_features}, {linear.in_features}]"
        return f"{name} has {most} singular values, fewer than rank {rank}" if rank > most else None

    def memory_bytes(self, linears: Sequence[LinearShape], rank: int) -> int:
        """The matrices of the largest linear."""
        sizes = (linear.in_features * linear.out_features for linear in linears)
        return self.matrices * FP32_BYTES * max(sizes, default=0)

    def flops(self, linears: Sequence[LinearShape]) -> int:
        """6 m n^2 + 20 n^3 for each weight of m x n, n the smaller; a randomised one is nothing beside a step.

        Source: Golub and Van Loan 2013, Matrix Computations, section 8.6, of one with the vectors of both sides.
        """
        if getattr(self.section, "iterations", None) is not None:
            return 0
        sizes = [(*sorted((linear.in_features, linear.out_features)), linear.count) for linear in linears]
        return sum((6 * m * n**2 + 20 * n**3) * count for n, m, count in sizes)
