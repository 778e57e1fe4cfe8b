"""A quantised weight made again from the base's file, block by block, and proven to be the one that training saw.

bitsandbytes quantises a flat tensor in blocks of 64 values, so stretches of rows that hold a multiple of 64 values give
the same codes as the whole tensor, for a small part of its 14 temporary bytes a value. Double quantisation then codes
all absmax values together; the subtracted mean is the run's own, since a mean's last bit depends on device and threads.

    file rows --cast--> weights_dtype --quantise--> codes, absmax --> hashes == the run's? --> dequantised rows
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorafit.errors import NumericsError
from lorafit.files.safetensors import AnyEntry, StackedEntry, TensorEntry, read_rows, row_blocks
from lorafit.model.inspect import count_differences, digest_of, hash_four_bit, hash_tensor
from lorafit.model.names import Part

if TYPE_CHECKING:
    import torch

    from lorafit.contracts import Reporter

QUANTISED_BLOCK = 64
_NESTED_BLOCK = 256


class PlainRows:
    """A weight as a file holds it, read when asked for.

    Args:
        entry: In the file.
        dtype: What it is rounded to at once, as a model that loads it does; the file's own where None.
    """

    def __init__(self, entry: TensorEntry, dtype: torch.dtype | None = None) -> None:
        self.entry, self._dtype = entry, dtype

    def read(self, start: int, stop: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of the tensor: `[stop - start, ...]`; `into`, where it fits."""
        rows = read_rows(self.entry, start, stop, into)
        return rows if self._dtype is None else rows.to(self._dtype)


class FourBitRows:
    """NF4 or FP4 values of a weight, as training saw them.

    Holds half a byte a value, and the constants. A transposed weight (GPT-2's Conv1D is quantised `[out, in]`, stored
    `[in, out]`) is held dequantised instead; such weights are small.

    Args:
        entry: The weight in the base's files.
        used: The run's quantization.json, tensors apart.
        proof: That weight's entry of its `tensors`; None where the run stored none.
    """

    def __init__(self, entry: AnyEntry, used: Mapping[str, Any], proof: Mapping[str, Any] | None) -> None:
        import torch
        from bitsandbytes.functional import dequantize_blockwise

        self._dtype: torch.dtype = getattr(torch, used["weights_dtype"])
        self._kind = str(used["kind"])
        self._transposed = bool(proof and proof.get("transposed"))
        self._shape = entry.shape[::-1] if self._transposed else entry.shape
        codes, absmax = self._quantise(entry)
        state = self._state(absmax, used, proof)
        self.proof = hash_four_bit(codes, state)
        self._codes = codes
        self._absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
        self._whole: torch.Tensor | None = None
        if self._transposed:
            blocks = row_blocks(*self._shape, multiple=QUANTISED_BLOCK)
            self._whole = torch.cat([self._dequantise(*block) for block in blocks]).t()
            del self._codes, self._absmax

    def read(self, start: int, stop: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """Rows in the file's orientation, dequantised to the dtype the weights had when training quantised them.

        `into` is not used: bitsandbytes allocates.
        """
        return self._dequantise(start, stop) if self._whole is None else self._whole[start:stop]

    def _quantise(self, entry: AnyEntry) -> tuple[torch.Tensor, torch.Tensor]:
        import torch
        from bitsandbytes.functional import quantize_4bit

        source = read_rows(entry).t() if self._transposed else None
        total = entry.elements
        codes = torch.empty((total + 1) // 2, dtype=torch.uint8)
        absmax = torch.empty(-(-total // QUANTISED_BLOCK), dtype=torch.float32)
        rows, width = self._shape
        for start, stop in row_blocks(rows, width, multiple=QUANTISED_BLOCK):
            values = read_rows(entry, start, stop) if source is None else source[start:stop]
            packed, state = quantize_4bit(
                values.to(self._dtype).contiguous(), blocksize=QUANTISED_BLOCK, quant_type=self._kind
            )
            first = start * width
            codes[first // 2 : first // 2 + packed.numel()] = packed.reshape(-1)
            block = first // QUANTISED_BLOCK
            absmax[block : block + state.absmax.numel()] = state.absmax
        return codes, absmax

    def _state(self, absmax: torch.Tensor, used: Mapping[str, Any], proof: Mapping[str, Any] | None) -> Any:
        import torch
        from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

        code = get_4bit_type(self._kind, device="cpu")
        fields = {"shape": torch.Size(self._shape), "dtype": self._dtype, "code": code, "quant_type": self._kind}
        if not used["double_quant"]:
            return QuantState(absmax=absmax, blocksize=QUANTISED_BLOCK, **fields)
        stored = proof.get("offset") if proof else None
        offset = absmax.mean() if stored is None else torch.tensor(stored, dtype=torch.float32)
        nested, state2 = quantize_blockwise(absmax - offset, blocksize=_NESTED_BLOCK)
        return QuantState(absmax=nested, offset=offset, state2=state2, blocksize=QUANTISED_BLOCK, **fields)

    def _dequantise(self, start: int, stop: int) -> torch.Tensor:
        """Any stretch of rows; it is widened to whole blocks of 64 values and cut again.

        As one long row: bitsandbytes' CPU code is wrong for rows that are no multiple of 64 wide.
        """
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

        width = self._shape[1]
        first, last = start * width, stop * width
        low = first // QUANTISED_BLOCK * QUANTISED_BLOCK
        high = min(-(-last // QUANTISED_BLOCK) * QUANTISED_BLOCK, self._shape[0] * width)
        state = QuantState(
            absmax=self._absmax[low // QUANTISED_BLOCK : -(-high // QUANTISED_BLOCK)],
            shape=torch.Size((1, high - low)),
            dtype=self._dtype,
            blocksize=QUANTISED_BLOCK,
            code=get_4bit_type(self._kind, device="cpu"),
            quant_type=self._kind,
        )
        flat: torch.Tensor = dequantize_4bit(self._codes[low // 2 : (high + 1) // 2].unsqueeze(1), state).reshape(-1)
        return flat[first - low : last - low].reshape(stop - start, width)


class Int8Rows:
    """LLM.int8() values of a weight; holds a byte a value, and a scale a row.

    bitsandbytes quantises from fp16. Its forward pass multiplies the codes themselves, so their values stay unrounded.
    """

    def __init__(self, entry: AnyEntry, used: Mapping[str, Any], proof: Mapping[str, Any] | None) -> None:
        import torch
        from bitsandbytes.functional import int8_vectorwise_quant

        self._dtype: torch.dtype = getattr(torch, used["weights_dtype"])
        self._transposed = bool(proof and proof.get("transposed"))
        source = read_rows(entry).t() if self._transposed else None
        shape = entry.shape[::-1] if self._transposed else entry.shape
        self._codes = torch.empty(shape, dtype=torch.int8)
        self._scales = torch.empty(shape[0], dtype=torch.float32)
        for start, stop in row_blocks(*shape):
            values = read_rows(entry, start, stop) if source is None else source[start:stop]
            values = values.to(self._dtype).to(torch.float16).contiguous()
            self._codes[start:stop], self._scales[start:stop], _ = int8_vectorwise_quant(values)
        self.proof: dict[str, Any] = {"codes": hash_tensor(self._codes), "constants": hash_tensor(self._scales)}

    def read(self, start: int, stop: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """Rows in the file's orientation: code x scale / 127 in fp32. `into` is not used: bitsandbytes allocates."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        rows = slice(None) if self._transposed else slice(start, stop)
        columns = slice(start, stop) if self._transposed else slice(None)
        values: torch.Tensor = int8_vectorwise_dequant(self._codes[rows, columns], self._scales[rows])
        return values.t() if self._transposed else values


Rows = PlainRows | FourBitRows | Int8Rows
REBUILDERS: dict[str, type[FourBitRows] | type[Int8Rows]] = {"nf4": FourBitRows, "fp4": FourBitRows, "int8": Int8Rows}


def compare_proof(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], *, same_device: bool) -> int:
    """Compares a rebuilt weight with what the run stored.

    Args:
        name: The weight's, for the message.
        ours: Proof of the rebuilt weight.
        theirs: The run's.
        same_device: Whether it was quantised on the same kind of device as now.

    Returns:
        Codes that are one level off; 0 where both are equal. Only another kind of device may have any.

    Raises:
        NumericsError: They differ and the device is the same, or nothing tells by how much.
    """
    exact = ("codes", "constants", "nested")
    wrong = [key for key in exact if ours.get(key) != theirs.get(key)]
    if not wrong:
        return 0
    sums = [key for key in ("code_sums", "constant_sums") if key in theirs]
    if same_device or not sums or "nested" in wrong:
        raise NumericsError(
            f"the rebuilt base differs from the one the run was trained on ({', '.join(wrong)})",
            key=name,
            todo="use the run's own base files; else merge with --base original",
        )
    return max(1, sum(count_differences(ours[key], theirs[key]) for key in sums))


class Rebuilder:
    """The quantised layers of a run, each made again when its rows are asked for, and proven.

    Args:
        entries: The base's tensors.
        used: The run's quantization.json.
        homes: Where each layer's weight lies in the files, by path.
    """

    def __init__(
        self, entries: Mapping[str, TensorEntry], used: Mapping[str, Any], homes: Mapping[str, Sequence[Part]]
    ) -> None:
        self._entries, self._used, self._homes = entries, used, homes
        self._recent: dict[str, FourBitRows | Int8Rows] = {}
        self._proofs: dict[str, Mapping[str, Any]] = {}
        self._codes_off = 0

    def rows(self, path: str) -> FourBitRows | Int8Rows:
        """A layer's values as training saw them. The last one is remembered: several tensors may hold its rows.

        Raises:
            NumericsError: They are not those of the run.
        """
        if path not in self._recent:
            proof, parts = self._used["tensors"][path], self._homes[path]
            made = REBUILDERS[self._used["kind"]](_stack(self._entries, parts), self._used, proof)
            off = compare_proof(parts[0].name, made.proof, proof, same_device=self._used.get("device") == "cpu")
            self._codes_off += 0 if path in self._proofs else off
            self._proofs[path] = made.proof
            self._recent = {path: made}
        return self._recent[path]

    def conclude(self, allowed_share: float, reporter: Reporter) -> int:
        """Codes that are one level off, once all layers were made again.

        Args:
            allowed_share: Of all codes, how many may be.
            reporter: Warned where some are.

        Raises:
            NumericsError: More are, or all together are not those of the run.
        """
        for path in (
            self._homes.keys() - self._proofs.keys()
        ):  # its rows are another's too, and were written as that one's
            self.rows(path)
        rows = (part.stop - part.start for parts in self._homes.values() for part in parts)
        widths = (self._entries[part.name].as_matrix().row_elements for parts in self._homes.values() for part in parts)
        total = sum(count * width for count, width in zip(rows, widths, strict=True))
        todo = "use the run's own base files"
        if self._codes_off > allowed_share * total:
            raise NumericsError(
                f"{self._codes_off} of {total} codes of the rebuilt base differ from the run's",
                todo=f"{todo}; else merge with --base original",
            )
        if self._codes_off:
            device = self._used.get("device")
            reporter.warn(f"{self._codes_off} of {total} codes are one level off: trained on {device}")
        elif self._used.get("digest") not in (None, digest_of(self._proofs)):
            raise NumericsError("the rebuilt base has another digest than the run's", todo=todo)
        return self._codes_off


def _stack(entries: Mapping[str, TensorEntry], parts: Sequence[Part]) -> AnyEntry:
    pieces = tuple(entries[part.name].as_matrix().rows_between(part.start, part.stop) for part in parts)
    return pieces[0] if len(pieces) == 1 else StackedEntry(pieces)
