"""How the frozen base weights are stored."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorafit.kinds.registry import Kind, S_co, SectionRegistry
from lorafit.kinds.section import KindSection

if TYPE_CHECKING:
    import torch

    from lorafit.facts import LinearShape

ComputeDtype = Literal["auto", "bf16", "fp16", "fp32"]
KeepUnpacked = bool | Literal["auto"]


class QuantizationSection(KindSection):
    """What every quantisation's section has."""


class Quantization(Kind[S_co]):
    """One way to store the frozen linear weights.

    Attributes:
        keeps_inputs: Whether its linears keep their input for the backward pass, out of checkpointing's reach.
    """

    is_quantized: ClassVar[bool]
    keeps_inputs: ClassVar[bool]

    @abstractmethod
    def weight_bytes(self, linear: LinearShape, dtype_bytes: int) -> int:
        """Bytes of the codes (or of the plain weights) of all `linear.count` weights."""

    @abstractmethod
    def constant_bytes(self, linear: LinearShape) -> int:
        """Bytes of the quantisation constants of all `linear.count` weights."""

    @abstractmethod
    def workspace_bytes(self, largest: LinearShape, dtype_bytes: int) -> int:
        """Bytes of the temporary that one forward or backward of the largest linear needs (its dequantised copy)."""

    @abstractmethod
    def transformers_config(self, compute_dtype: torch.dtype, skip_modules: list[str]) -> Any:
        """What `from_pretrained(quantization_config=)` gets; None for plain weights."""


quantizations: SectionRegistry[Quantization[QuantizationSection]] = SectionRegistry(
    "quantization", "lorafit.kinds.quantizations"
)
