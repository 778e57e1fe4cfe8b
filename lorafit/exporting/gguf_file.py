"""Weights into a GGUF file, a few MiB at a time, and the file read back against them.

safetensors --rows--> fp32, heads turned --ggml's type--> tensor of the GGUF --read back--> within its rounding?
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from lorafit.contracts import Reporter
from lorafit.errors import NumericsError, UsageError
from lorafit.exporting.architectures import turn_heads
from lorafit.files.safetensors import TensorEntry, read_rows, row_blocks

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

DataType = Literal["f32", "f16", "bf16", "q8_0"]
DATA_TYPES: tuple[DataType, ...] = ("f32", "f16", "bf16", "q8_0")
_Q8_BLOCK = 32
_SHARE = {"F32": 2**-24, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.0}  # most that rounding moves a value by, of itself
_FLOOR = {"F32": 0.0, "F16": 2**-25, "BF16": 2**-126, "Q8_0": 0.0}  # and of nothing, where values are denormal
_Q8_SHARE = 0.5 / 127 + 2**-11  # of the largest of its block: half a level, and the scale's own rounding to f16


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file to be.

    Attributes:
        name: In the GGUF.
        values: Rows in a file, or the whole tensor.
        heads: How many heads' rows are turned; None: none.
    """

    name: str
    values: TensorEntry | torch.Tensor
    heads: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`[rows, ...]`."""
        return tuple(self.values.shape)

    def type_in(self, wanted: DataType) -> GGMLQuantizationType:
        """ggml's type: vectors stay f32, and matrices whose rows fill no block of q8_0 are f16."""
        from gguf import GGMLQuantizationType

        if len(self.shape) < 2:
            return GGMLQuantizationType.F32
        fits = wanted != "q8_0" or self.shape[-1] % _Q8_BLOCK == 0
        return GGMLQuantizationType[wanted.upper() if fits else "F16"]

    def blocks(self) -> Iterator[torch.Tensor]:
        """Its rows in order, in fp32, a few at a time and whole heads at least."""
        rows, width = self.shape[0], max(1, int(torch.Size(self.shape[1:]).numel()))
        size = rows // self.heads if self.heads else 1
        for start, stop in row_blocks(rows // size, size * width):
            low, high = start * size, stop * size
            is_file = isinstance(self.values, TensorEntry)
            part = (read_rows(self.values, low, high) if is_file else self.values[low:high]).float()  # type: ignore[arg-type,index]
            yield turn_heads(part, stop - start) if self.heads else part


def write_gguf(
    file: Path,
    architecture: str,
    tensors: Sequence[GgufTensor],
    data_type: DataType,
    describe: Callable[[GGUFWriter], None],
    reporter: Reporter,
) -> None:
    """Writes a GGUF file and reads it back.

    Args:
        file: To be made.
        architecture: Its `general.architecture`.
        tensors: In the order of the file.
        data_type: Of matrices.
        describe: Writes what stands before the tensors.
        reporter: Shows progress.

    Raises:
        NumericsError: A value that was read back is further from the model's than its type's rounding.
    """
    import numpy as np
    from gguf import GGUFWriter, quant_shape_to_byte_shape
    from gguf.quants import quantize

    logging.getLogger("gguf").setLevel(logging.ERROR)
    writer = GGUFWriter(file, architecture)
    try:
        describe(writer)
        types = [tensor.type_in(data_type) for tensor in tensors]
        sizes = []
        for tensor, kind in zip(tensors, types, strict=True):
            shape = quant_shape_to_byte_shape(tensor.shape, kind)
            sizes.append(int(np.prod(shape)))
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), sizes[-1], raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        stream = (writer.fout or [])[0]
        writer.write_padding(stream, stream.tell())
        with reporter.track(len(tensors), "writing GGUF") as bar, np.errstate(over="ignore"):
            for tensor, kind, size in zip(tensors, types, sizes, strict=True):
                for block in tensor.blocks():
                    stream.write(quantize(block.numpy(), kind).tobytes())
                writer.write_padding(stream, size)
                bar.advance(1)
    finally:
        writer.close()
    check_gguf(file, tensors)


def check_gguf(file: Path, tensors: Sequence[GgufTensor]) -> None:
    """Raises NumericsError where a file does not hold the tensors within their types' rounding."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    written = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    for tensor in tensors:
        found = written[tensor.name]
        kind, row = found.tensor_type.name, 0
        data = found.data.reshape(tensor.shape[0], -1)
        for block in tensor.blocks():
            back = dequantize(data[row : row + len(block)], found.tensor_type)
            row += len(block)
            if not _is_within(torch.from_numpy(back.astype("float32", copy=True)).reshape(block.shape), block, kind):
                raise NumericsError(
                    f"was read back as something else than {kind} makes of the model's values",
                    file=file.name,
                    key=tensor.name,
                    todo="use --dtype bf16 or f32" if kind == "F16" else "nothing was kept; check the disk",
                )


def _is_within(back: torch.Tensor, exact: torch.Tensor, kind: str) -> bool:
    bound = exact.abs() * _SHARE[kind] + _FLOOR[kind]
    if kind == "Q8_0":
        bound = exact.reshape(-1, _Q8_BLOCK).abs().amax(1, keepdim=True) * _Q8_SHARE
        back, exact = back.reshape(-1, _Q8_BLOCK), exact.reshape(-1, _Q8_BLOCK)
    return bool(((back - exact).abs() <= bound).all())


def require_type(text: str | None) -> DataType:
    """A type of matrices by its name; f16 where none is named. Raises UsageError for another name."""
    for known in DATA_TYPES:
        if text in (None, known):
            return "f16" if text is None else known
    raise UsageError(f"'{text}' is no type of a GGUF's weights", key="--dtype", todo=f"use {', '.join(DATA_TYPES)}")
