"""Four bits a weight, as bitsandbytes stores them: NF4 with codes at the quantiles of a normal distribution, and FP4
with those of a 4-bit float (sign, two exponent bits, one mantissa bit).

    w ~ code[q] * absmax        one fp32 absmax for 64 weights, or, double-quantised,
    absmax ~ map[a] * absmax2 + offset      8 bits each, one fp32 absmax2 for 256 of them, one offset a tensor

bitsandbytes quantises a flat tensor in blocks of 64 values, so stretches of rows that hold a multiple of 64 values give
the same codes as the whole tensor, for a small part of its 14 temporary bytes a value. Double quantisation then codes
all absmax values together; the subtracted mean is the run's own, since a mean's last bit depends on device and threads.

Source: Dettmers et al. 2023, QLoRA (https://arxiv.org/abs/2305.14314), section 3 and equation 5; section 4 compares FP4
with NF4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.files.safetensors import AnyEntry, row_blocks
from lorafit.kinds.code_proofs import hash_tensor, sum_codes
from lorafit.kinds.quantizations import ComputeDtype, KeepUnpacked, QuantizationSection, quantizations
from lorafit.kinds.quantizations._bitsandbytes import BitsandbytesKind, is_layer, rounded_blocks

if TYPE_CHECKING:
    import torch
    from bitsandbytes.functional import QuantState
    from torch import nn

    from lorafit.facts import LinearShape

BLOCK_WEIGHTS = 64  # bitsandbytes' Params4bit default on every device
NESTED_BLOCK = 256  # absmax values that share one second-level absmax
_CODES_OF_ZERO = 0x77  # two of NF4's in a byte
_CODE_VALUES, _NESTED_CODE_VALUES, _OFFSET_BYTES = 16, 256, 4


class FourBitSection(QuantizationSection):
    """Frozen linear weights in four bits."""

    double_quant: bool = True
    """Quantise the constants too: 0.516 instead of 0.563 bytes a weight."""
    compute_dtype: ComputeDtype = "auto"
    """Dtype of the products with dequantised weights; `auto`: model.dtype."""
    keep_unpacked: KeepUnpacked = "auto"
    """Keep each adapted weight's dequantised copy for the whole run: faster, 2 bytes a weight more (4 in fp32).

    `auto`: where the plan's memory has room; on a GPU where a wide micro-batch without checkpointing fits beside it."""


class Nf4Section(FourBitSection):
    """Frozen linear weights in 4-bit NormalFloat."""

    kind: Literal["nf4"] = "nf4"
    """4-bit NormalFloat (QLoRA)."""


class Fp4Section(FourBitSection):
    """Frozen linear weights in 4-bit floating point."""

    kind: Literal["fp4"] = "fp4"
    """4-bit float."""


F_co = TypeVar("F_co", bound=FourBitSection, covariant=True)


class FourBit(BitsandbytesKind[F_co]):
    """bitsandbytes' Linear4bit; its names for the sixteen codes are the kinds' own."""

    keeps_inputs: ClassVar[bool] = False
    cpu_row_multiple: ClassVar[int] = BLOCK_WEIGHTS  # bitsandbytes 0.50 pairs weights with other blocks' constants

    def weight_bytes(self, linear: LinearShape, dtype_bytes: int) -> int:
        """Two weights a byte."""
        return (linear.in_features * linear.out_features + 1) // 2 * linear.count

    def constant_bytes(self, linear: LinearShape) -> int:
        """Block constants and the code tables that every tensor carries."""
        blocks = -(-linear.in_features * linear.out_features // BLOCK_WEIGHTS)
        if not self.section.double_quant:
            return 4 * (blocks + _CODE_VALUES) * linear.count
        nested = -(-blocks // NESTED_BLOCK)
        return (blocks + 4 * (nested + _CODE_VALUES + _NESTED_CODE_VALUES) + _OFFSET_BYTES) * linear.count

    def settings(self, compute_dtype: torch.dtype) -> JsonObject:
        """The section's."""
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.name(),
            "bnb_4bit_use_double_quant": self.section.double_quant,
            "bnb_4bit_compute_dtype": compute_dtype,
        }

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """Quantised and dequantised, as one long row: bitsandbytes' CPU code is wrong for others of odd widths."""
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        codes, state = quantize_4bit(
            weight.reshape(1, -1),
            blocksize=BLOCK_WEIGHTS,
            compress_statistics=self.section.double_quant,
            quant_type=self.name(),
        )
        values: torch.Tensor = dequantize_4bit(codes, state).reshape(weight.shape)
        return values

    @classmethod
    def holds(cls, layer: nn.Module) -> bool:
        """A Linear4bit with these codes."""
        return is_layer(layer, "Linear4bit") and getattr(layer.weight, "quant_type", None) == cls.name()

    @classmethod
    def prove(cls, layer: nn.Module) -> JsonObject:
        """See `hash_four_bit`."""
        weight: Any = layer.weight
        return hash_four_bit(weight.data, weight.quant_state)

    @classmethod
    def rebuild(cls, entry: AnyEntry, used: JsonMapping, proof: JsonMapping) -> FourBitRows:
        """Quantised again; constants of their own constants in its proof say that both are."""
        import torch

        double_quant = bool(used.get("double_quant", "nested" in proof))
        return FourBitRows(entry, cls.name(), getattr(torch, used["weights_dtype"]), double_quant, proof)

    @classmethod
    def fake(cls, layer: nn.Module) -> nn.Parameter:
        """Packed codes and their constants, as `quantize_4bit` leaves them on a loaded layer."""
        import torch
        from bitsandbytes.functional import QuantState

        linear: Any = layer
        old = linear.weight
        shape = torch.Size((linear.out_features, linear.in_features))
        blocks = -(-shape.numel() // BLOCK_WEIGHTS)
        codes = torch.empty(((shape.numel() + 1) // 2, 1), dtype=torch.uint8)
        weight: torch.nn.Parameter = torch.nn.Parameter(codes, requires_grad=False)
        nested = None
        if old.compress_statistics:
            nested = QuantState(
                absmax=torch.empty(-(-blocks // NESTED_BLOCK)),
                code=torch.empty(_NESTED_CODE_VALUES),
                blocksize=NESTED_BLOCK,
                dtype=torch.float32,
            )
        state = QuantState(
            absmax=torch.empty(blocks, dtype=torch.float32 if nested is None else torch.uint8),
            shape=shape,
            code=torch.empty(_CODE_VALUES),
            blocksize=BLOCK_WEIGHTS,
            quant_type=old.quant_type,
            dtype=linear.compute_dtype,
            offset=None if nested is None else torch.empty(()),
            state2=nested,
        )
        for name, value in {
            "quant_state": state,
            "bnb_quantized": True,
            "compress_statistics": old.compress_statistics,
            "quant_type": old.quant_type,
            "quant_storage": old.quant_storage,
            "blocksize": BLOCK_WEIGHTS,
        }.items():
            setattr(weight, name, value)
        linear.quant_state = state
        return weight

    @classmethod
    def unpack(cls, layer: nn.Module) -> torch.Tensor:
        """Dequantised to the dtype that the layer's state names."""
        import torch
        from bitsandbytes.functional import dequantize_4bit

        linear: Any = layer
        state = getattr(linear.weight, "quant_state", None)
        if state is None:
            return torch.empty(linear.out_features, linear.in_features, device=linear.weight.device)
        unpacked: torch.Tensor = dequantize_4bit(linear.weight, state)
        return unpacked


@quantizations.register(Nf4Section)
class Nf4(FourBit[Nf4Section]):
    """Linear4bit with the NF4 code."""

    @classmethod
    def settle(cls, layer: nn.Module) -> None:
        """See `settle_zero_blocks`."""
        weight: Any = layer.weight
        settle_zero_blocks(weight.data, weight.quant_state)


@quantizations.register(Fp4Section)
class Fp4(FourBit[Fp4Section]):
    """Linear4bit with the FP4 code."""


def settle_zero_blocks(codes: torch.Tensor, state: QuantState) -> None:
    """Gives blocks of 64 zero weights the code of 0, in place, as a CPU does.

    CUDA divides 0 by 0 there and writes the lowest code, minus the block's constant: nothing where that is 0, but not
    once the constant is quantised too. So a block is one of zeros where all its codes are the lowest and its constant
    may be a rounded 0.
    """
    import torch
    from bitsandbytes.functional import dequantize_blockwise

    constants, rounding = state.absmax, torch.zeros((), device=codes.device)
    if state.nested:
        constants = dequantize_blockwise(state.absmax, state.state2) + state.offset
        widest_step = state.state2.code.diff().max()
        rounding = (state.state2.absmax * widest_step).repeat_interleave(NESTED_BLOCK)[: len(constants)]
    bytes_a_block, flat = BLOCK_WEIGHTS // 2, codes.view(-1)
    places = (constants.abs() <= rounding).nonzero() * bytes_a_block + torch.arange(bytes_a_block, device=codes.device)
    places = places.clamp_(max=len(flat) - 1)
    flat[places[(flat[places] == 0).all(1)]] = _CODES_OF_ZERO


def hash_four_bit(codes: torch.Tensor, state: QuantState) -> JsonObject:
    """The proof of one 4-bit weight: codes, constants and offset, never dequantised values.

    Returns:
        `codes`: hash of the packed codes. `constants`: hash of the absmax values, or of their codes where those are
        quantised; then also `nested`: hash of their second-level constants, and `offset`: the subtracted mean.
        `code_sums` and `constant_sums`: see `sum_codes`.
    """
    proof: JsonObject = {
        "shape": [int(length) for length in state.shape],
        "codes": hash_tensor(codes),
        "code_sums": sum_codes(codes, packed=True),
        "constants": hash_tensor(state.absmax),
        "offset": None,
    }
    if state.nested:
        proof["constant_sums"] = sum_codes(state.absmax, packed=False)
        proof["nested"] = hash_tensor(state.state2.absmax)
        proof["offset"] = float(state.offset)
    return proof


class FourBitRows:
    """NF4 or FP4 values of a weight, as training saw them.

    Holds half a byte a value, and the constants. A transposed weight (GPT-2's Conv1D is quantised `[out, in]`, stored
    `[in, out]`) is held dequantised instead; such weights are small.

    Args:
        entry: The weight in the base's files.
        code: `nf4` or `fp4`.
        dtype: What the weight was rounded to before it was quantised.
        double_quant: Whether its constants are quantised.
        proof: What the run noted of it: `transposed`, and the `offset` of its constants where it was double-quantised.
    """

    def __init__(self, entry: AnyEntry, code: str, dtype: torch.dtype, double_quant: bool, proof: JsonMapping) -> None:
        import torch
        from bitsandbytes.functional import dequantize_blockwise

        self._dtype, self._kind, self._transposed = dtype, code, bool(proof.get("transposed"))
        self._shape = entry.shape[::-1] if self._transposed else entry.shape
        codes, absmax = self._quantise(entry)
        state = self._state(absmax, double_quant, proof.get("offset"))
        self.proof = hash_four_bit(codes, state)
        self._codes = codes
        self._absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
        self._whole: torch.Tensor | None = None
        if self._transposed:
            blocks = row_blocks(*self._shape, multiple=BLOCK_WEIGHTS)
            self._whole = torch.cat([self._dequantise(*block) for block in blocks]).t()
            del self._codes, self._absmax

    def read(self, start: int, stop: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """Rows in the file's orientation, dequantised to fp32 and not rounded, also where training rounds them.

        Whoever writes them rounds once, with an adapter's change in them. Rounded before, they would lie on the steps
        of bf16, a change of less than half a step would be rounded away again wherever it stands, and with it most of
        what a short run has learnt. `into` is not used: bitsandbytes allocates.
        """
        return self._dequantise(start, stop) if self._whole is None else self._whole[start:stop]

    def _quantise(self, entry: AnyEntry) -> tuple[torch.Tensor, torch.Tensor]:
        import torch
        from bitsandbytes.functional import quantize_4bit

        total, width = entry.elements, self._shape[1]
        codes = torch.empty((total + 1) // 2, dtype=torch.uint8)
        absmax = torch.empty(-(-total // BLOCK_WEIGHTS), dtype=torch.float32)
        blocks = rounded_blocks(entry, self._dtype, transposed=self._transposed, multiple=BLOCK_WEIGHTS)
        for start, _, values in blocks:
            packed, state = quantize_4bit(values.contiguous(), blocksize=BLOCK_WEIGHTS, quant_type=self._kind)
            first = start * width
            codes[first // 2 : first // 2 + packed.numel()] = packed.reshape(-1)
            block = first // BLOCK_WEIGHTS
            absmax[block : block + state.absmax.numel()] = state.absmax
        return codes, absmax

    def _state(self, absmax: torch.Tensor, double_quant: bool, offset_noted: float | None) -> QuantState:
        import torch
        from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

        code = get_4bit_type(self._kind, device="cpu")
        fields = {"shape": torch.Size(self._shape), "dtype": self._dtype, "code": code, "quant_type": self._kind}
        if not double_quant:
            return QuantState(absmax=absmax, blocksize=BLOCK_WEIGHTS, **fields)
        offset = absmax.mean() if offset_noted is None else torch.tensor(offset_noted, dtype=torch.float32)
        nested, state2 = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        return QuantState(absmax=nested, offset=offset, state2=state2, blocksize=BLOCK_WEIGHTS, **fields)

    def _dequantise(self, start: int, stop: int) -> torch.Tensor:
        """Any stretch of rows; it is widened to whole blocks of 64 values and cut again.

        As one long row: bitsandbytes' CPU code is wrong for rows that are no multiple of 64 wide.
        """
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

        width = self._shape[1]
        first, last = start * width, stop * width
        low = first // BLOCK_WEIGHTS * BLOCK_WEIGHTS
        high = min(-(-last // BLOCK_WEIGHTS) * BLOCK_WEIGHTS, self._shape[0] * width)
        state = QuantState(
            absmax=self._absmax[low // BLOCK_WEIGHTS : -(-high // BLOCK_WEIGHTS)],
            shape=torch.Size((1, high - low)),
            dtype=torch.float32,
            blocksize=BLOCK_WEIGHTS,
            code=get_4bit_type(self._kind, device="cpu"),
            quant_type=self._kind,
        )
        flat: torch.Tensor = dequantize_4bit(self._codes[low // 2 : (high + 1) // 2].unsqueeze(1), state).reshape(-1)
        return flat[first - low : last - low].reshape(stop - start, width)
