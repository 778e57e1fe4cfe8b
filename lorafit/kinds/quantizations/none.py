"""No quantisation: the frozen linears keep the model's dtype."""

from __future__ import annotations

from typing import ClassVar, Literal

from lorafit.facts import LinearShape
from lorafit.kinds.quantizations import Quantization, QuantizationSection, quantizations


class NoneSection(QuantizationSection):
    """Frozen linear weights stay as they are."""

    kind: Literal["none"] = "none"
    """Plain weights in the model's dtype."""


@quantizations.register(NoneSection)
class NoQuantization(Quantization[NoneSection]):
    """Plain weights."""

    is_quantized: ClassVar[bool] = False
    keeps_inputs: ClassVar[bool] = False

    def weight_bytes(self, linear: LinearShape, dtype_bytes: int) -> int:
        """Bytes of the plain weights."""
        return linear.weight_parameters * dtype_bytes

    def constant_bytes(self, linear: LinearShape) -> int:
        """There are no constants."""
        return 0

    def workspace_bytes(self, largest: LinearShape, dtype_bytes: int) -> int:
        """Nothing is dequantised."""
        return 0
