"""How the frozen base weights are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from lorafit.kinds.registry import Registry
from lorafit.kinds.section import Section

if TYPE_CHECKING:
    import torch

    from lorafit.facts import LinearShape

ComputeDtype = Literal["auto", "bf16", "fp16", "fp32"]
KeepUnpacked = bool | Literal["auto"]


class QuantizationSection(Section):
    """What every quantisation's section has."""

    kind: str


class Quantization(Protocol):
    """One way to store the frozen linear weights.

    Attributes:
        keeps_inputs: Whether its linears keep their input for the backward pass, out of checkpointing's reach.
    """

    section: type[Any]
    is_quantized: ClassVar[bool]
    keeps_inputs: ClassVar[bool]

    def weight_bytes(self, section: Any, linear: LinearShape, dtype_bytes: int) -> int:
        """Bytes of the codes (or of the plain weights) of all `linear.count` weights."""

    def constant_bytes(self, section: Any, linear: LinearShape) -> int:
        """Bytes of the quantisation constants of all `linear.count` weights."""

    def workspace_bytes(self, section: Any, largest: LinearShape, dtype_bytes: int) -> int:
        """Bytes of the temporary that one forward or backward of the largest linear needs (its dequantised copy)."""

    def transformers_config(self, section: Any, compute_dtype: torch.dtype, skip_modules: list[str]) -> Any:
        """What `from_pretrained(quantization_config=)` gets; None for plain weights."""


quantizations: Registry[Quantization] = Registry("quantization", "lorafit.kinds.quantizations")
