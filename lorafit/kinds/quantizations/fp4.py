"""FP4: four bits a weight, with the codes of a 4-bit float (sign, two exponent bits, one mantissa bit).

    w ~ code[q] * absmax        one fp32 absmax for 64 weights, or, double-quantised,
    absmax ~ map[a] * absmax2 + offset      8 bits each, one fp32 absmax2 for 256 of them, one offset a tensor

Source: Dettmers et al. 2023, QLoRA (https://arxiv.org/abs/2305.14314), section 4, where it is compared with NF4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorafit.kinds.quantizations import ComputeDtype, KeepUnpacked, Quantization, QuantizationSection, quantizations

if TYPE_CHECKING:
    import torch

    from lorafit.facts import LinearShape

BLOCK_WEIGHTS = 64  # bitsandbytes' Params4bit default on every device
NESTED_BLOCK = 256  # absmax values that share one second-level absmax
_CODE_BYTES, _NESTED_CODE_BYTES, _OFFSET_BYTES = 16 * 4, 256 * 4, 4


class Fp4Section(QuantizationSection):
    """Frozen linear weights in 4-bit floating point."""

    kind: Literal["fp4"] = "fp4"
    """4-bit float."""
    double_quant: bool = True
    """Quantise the constants too: 0.516 instead of 0.563 bytes a weight."""
    compute_dtype: ComputeDtype = "auto"
    """Dtype of the products with dequantised weights; `auto`: model.dtype."""
    keep_unpacked: KeepUnpacked = "auto"
    """Keep each adapted weight's dequantised copy for the whole run: faster, 2 bytes a weight more (4 in fp32).

    `auto`: on a CPU where the plan's memory has room, never on a GPU."""


@quantizations.register(Fp4Section)
class Fp4(Quantization[Fp4Section]):
    """bitsandbytes' Linear4bit with the FP4 code."""

    is_quantized: ClassVar[bool] = True
    keeps_inputs: ClassVar[bool] = False

    def weight_bytes(self, linear: LinearShape, dtype_bytes: int) -> int:
        """Two weights a byte."""
        return (linear.in_features * linear.out_features + 1) // 2 * linear.count

    def constant_bytes(self, linear: LinearShape) -> int:
        """Block constants and the code tables that every tensor carries."""
        blocks = -(-linear.in_features * linear.out_features // BLOCK_WEIGHTS)
        if not self.section.double_quant:
            return (4 * blocks + _CODE_BYTES) * linear.count
        nested = -(-blocks // NESTED_BLOCK)
        return (blocks + 4 * nested + _CODE_BYTES + _NESTED_CODE_BYTES + _OFFSET_BYTES) * linear.count

    def workspace_bytes(self, largest: LinearShape, dtype_bytes: int) -> int:
        """The dequantised copy of one weight, in the compute dtype."""
        return largest.in_features * largest.out_features * dtype_bytes

    def transformers_config(self, compute_dtype: torch.dtype, skip_modules: list[str]) -> Any:
        """transformers' BitsAndBytesConfig for the self.section."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="fp4",
            bnb_4bit_use_double_quant=self.section.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
            llm_int8_skip_modules=skip_modules,
        )
