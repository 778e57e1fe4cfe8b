"""LLM.int8(): eight bits a weight, one fp32 scale a row; columns that meet outlier activations are computed in 16 bits.

    w[i, :] ~ code[i, :] * scale[i] / 127

Source: Dettmers et al. 2022, LLM.int8() (https://arxiv.org/abs/2208.07339), section 3.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.files.safetensors import AnyEntry
from lorafit.kinds.code_proofs import hash_tensor
from lorafit.kinds.quantizations import QuantizationSection, quantizations
from lorafit.kinds.quantizations._bitsandbytes import BitsandbytesKind, is_layer, rounded_blocks

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorafit.facts import LinearShape


class Int8Section(QuantizationSection):
    """Frozen linear weights in 8 bits."""

    kind: Literal["int8"] = "int8"
    """8-bit integers with a scale a row (LLM.int8())."""


@quantizations.register(Int8Section)
class Int8(BitsandbytesKind[Int8Section]):
    """bitsandbytes' Linear8bitLt."""

    keeps_inputs: ClassVar[bool] = True  # MatMul8bitLt and MatMul8bitFp hold it as a plain attribute of the node

    def weight_bytes(self, linear: LinearShape, dtype_bytes: int) -> int:
        """One byte a weight."""
        return linear.weight_parameters

    def constant_bytes(self, linear: LinearShape) -> int:
        """One fp32 scale a row."""
        return 4 * linear.out_features * linear.count

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """Quantised, from fp16 as bitsandbytes does it, and dequantised."""
        import torch
        from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

        codes, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
        values: torch.Tensor = int8_vectorwise_dequant(codes, scales)
        return values.to(weight.dtype)

    def settings(self, compute_dtype: torch.dtype) -> JsonObject:
        """LLM.int8() computes in the dtype of its input."""
        return {"load_in_8bit": True}

    @classmethod
    def holds(cls, layer: nn.Module) -> bool:
        """A Linear8bitLt."""
        return is_layer(layer, "Linear8bitLt")

    @classmethod
    def settle(cls, layer: nn.Module) -> None:
        """Keeps its scales, see `_keep_scales`; and on a CPU computes in evaluation as in training: there alone
        bitsandbytes would round what the layer reads too, and by columns that depend on all tokens of a batch.
        """
        layer.register_forward_pre_hook(_keep_scales)
        state: Any = layer.state
        if layer.weight.device.type == "cpu":
            state.__class__ = _state_as_trained()

    @classmethod
    def prove(cls, layer: nn.Module) -> JsonObject:
        """Codes and scales."""
        weight: Any = layer.weight
        shape = [int(length) for length in weight.shape]
        return {"shape": shape, "codes": hash_tensor(weight.data), "constants": hash_tensor(weight.SCB)}

    @classmethod
    def rebuild(cls, entry: AnyEntry, used: JsonMapping, proof: JsonMapping) -> Int8Rows:
        """Quantised again."""
        import torch

        return Int8Rows(entry, getattr(torch, used["weights_dtype"]), transposed=bool(proof.get("transposed")))

    @classmethod
    def fake(cls, layer: nn.Module) -> nn.Parameter:
        """Codes and a scale a row; the layer's state holds them from its first forward on."""
        import torch

        linear: Any = layer
        codes = torch.empty((linear.out_features, linear.in_features), dtype=torch.int8)
        weight: Any = torch.nn.Parameter(codes, requires_grad=False)
        weight.CB = weight.SCB = None
        linear.state.CB, linear.state.SCB = codes, torch.empty(linear.out_features)
        fake: torch.nn.Parameter = weight
        return fake

    @classmethod
    def unpack(cls, layer: nn.Module) -> torch.Tensor:
        """Code x scale / 127 in fp32."""
        import torch
        from bitsandbytes.functional import int8_vectorwise_dequant

        linear: Any = layer
        weight = linear.weight
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else linear.state.SCB
        if scales is None:
            return torch.empty(linear.out_features, linear.in_features, device=weight.device)
        unpacked: torch.Tensor = int8_vectorwise_dequant(weight.data, scales)
        return unpacked


@cache
def _state_as_trained() -> type:
    """bitsandbytes' state of a layer, which stays in training whatever is set."""
    from bitsandbytes import MatmulLtState

    steady = {"is_training": property(lambda _: True, lambda _, __: None)}
    return type("StateAsTrained", (MatmulLtState,), steady)


def _keep_scales(layer: nn.Module, _: object) -> None:
    """PEFT's DoRA moves a CPU's weight to where it lies: bitsandbytes makes a new one, which has codes and no scales.

    At the next forward the layer would take those in the place of its own.
    """
    linear: Any = layer
    if linear.weight.SCB is None and linear.state.SCB is not None:
        linear.weight.CB = None


class Int8Rows:
    """LLM.int8() values of a weight; holds a byte a value, and a scale a row.

    bitsandbytes quantises from fp16. Its forward pass multiplies the codes themselves, so their values stay unrounded.

    Args:
        entry: The weight in the base's files.
        dtype: What the weight was rounded to before it was quantised.
        transposed: Whether it lies `[in, out]` in the files.
    """

    def __init__(self, entry: AnyEntry, dtype: torch.dtype, *, transposed: bool) -> None:
        import torch
        from bitsandbytes.functional import int8_vectorwise_quant

        self._transposed = transposed
        shape = entry.shape[::-1] if self._transposed else entry.shape
        self._codes = torch.empty(shape, dtype=torch.int8)
        self._scales = torch.empty(shape[0], dtype=torch.float32)
        for start, stop, rounded in rounded_blocks(entry, dtype, transposed=transposed):
            values = rounded.to(torch.float16).contiguous()
            self._codes[start:stop], self._scales[start:stop], _ = int8_vectorwise_quant(values)
        self.proof: JsonObject = {"codes": hash_tensor(self._codes), "constants": hash_tensor(self._scales)}

    def read(self, start: int, stop: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """Rows in the file's orientation: code x scale / 127 in fp32. `into` is not used: bitsandbytes allocates."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        rows = slice(None) if self._transposed else slice(start, stop)
        columns = slice(start, stop) if self._transposed else slice(None)
        values: torch.Tensor = int8_vectorwise_dequant(self._codes[rows, columns], self._scales[rows])
        return values.t() if self._transposed else values
