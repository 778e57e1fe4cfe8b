"""LLM.int8(): eight bits a weight, one fp32 scale a row; columns that meet outlier activations are computed in 16 bits.

    w[i, :] ~ code[i, :] * scale[i] / 127

Source: Dettmers et al. 2022, LLM.int8() (https://arxiv.org/abs/2208.07339), section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorafit.kinds.quantizations import Quantization, QuantizationSection, quantizations

if TYPE_CHECKING:
    import torch

    from lorafit.facts import LinearShape


class Int8Section(QuantizationSection):
    """Frozen linear weights in 8 bits."""

    kind: Literal["int8"] = "int8"
    """8-bit integers with a scale a row (LLM.int8())."""


@quantizations.register(Int8Section)
class Int8(Quantization[Int8Section]):
    """bitsandbytes' Linear8bitLt."""

    is_quantized: ClassVar[bool] = True
    keeps_inputs: ClassVar[bool] = True  # MatMul8bitLt and MatMul8bitFp hold it as a plain attribute of the node

    def weight_bytes(self, linear: LinearShape, dtype_bytes: int) -> int:
        """One byte a weight."""
        return linear.weight_parameters

    def constant_bytes(self, linear: LinearShape) -> int:
        """One fp32 scale a row."""
        return 4 * linear.out_features * linear.count

    def workspace_bytes(self, largest: LinearShape, dtype_bytes: int) -> int:
        """The dequantised copy of one weight that the backward pass makes."""
        return largest.in_features * largest.out_features * dtype_bytes

    def transformers_config(self, compute_dtype: torch.dtype, skip_modules: list[str]) -> Any:
        """transformers' BitsAndBytesConfig; LLM.int8() computes in the dtype of its input."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip_modules)
