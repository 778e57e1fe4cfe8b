"""safetensors files by plain reads: headers first, checked before anything is loaded; tensors by rows, when wanted.

    8 bytes length n | n bytes JSON header | data
                       {"name": {"dtype": "BF16", "shape": [out, in], "data_offsets": [begin, end]}, ...}

Headers are checked by the safetensors library. Data is not read through a mapping: what is read of one counts as
resident memory, and a merge must stay small.

Source: safetensors' format description (https://huggingface.co/docs/safetensors), which asks readers to refuse holes,
overlaps, duplicate keys (the library takes them) and headers over 100 MB.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lorafit.contracts import JsonObject
from lorafit.errors import ModelError, SafetyError
from lorafit.files.strict_json import JsonError, parse_json, read_json_file

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT_BYTES = 100_000_000
BLOCK_ELEMENTS = 512 * 1024
"""Values read, quantised and written at a time: 1 MiB in bf16."""
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.bin", "consolidated.00.pth")

DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_TORCH_NAMES = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "BF16": "bfloat16",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for a safetensors dtype name such as `BF16`."""
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[name])
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name for a torch dtype."""
    return {value: key for key, value in _TORCH_NAMES.items()}[str(dtype).removeprefix("torch.")]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        offset: First byte of its data, from the start of the file.
        size_bytes: Bytes of its data.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    @property
    def elements(self) -> int:
        """Values it holds."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Length of its first axis; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_elements(self) -> int:
        """Values of one step along its first axis."""
        return math.prod(self.shape[1:])

    def as_matrix(self) -> TensorEntry:
        """The same tensor with all axes but its last taken as one; as it is where it has no more than two."""
        if len(self.shape) < 3:
            return self
        return replace(self, shape=(math.prod(self.shape[:-1]), self.shape[-1]))

    def rows_between(self, start: int, stop: int) -> TensorEntry:
        """Rows `start` to `stop` as a tensor of their own."""
        row_bytes = self.row_elements * DTYPE_BYTES[self.dtype]
        return replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            offset=self.offset + start * row_bytes,
            size_bytes=(stop - start) * row_bytes,
        )


@dataclass(frozen=True, slots=True)
class StackedEntry:
    """Rows of several tensors, of one width and dtype, read as one matrix: `[rows, columns]`."""

    parts: tuple[TensorEntry, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows of all, and their columns."""
        return (sum(part.rows for part in self.parts), *self.parts[0].shape[1:])

    @property
    def elements(self) -> int:
        """Values it holds."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Rows of all parts together."""
        return self.shape[0]


AnyEntry = TensorEntry | StackedEntry


def _look(head: bytes, size: int) -> str | None:
    """What a file that is no safetensors file looks like; None where nothing is odd."""
    if size == 0:
        return "is empty (0 bytes)"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights"
    if head.lstrip()[:1] == b"<":
        return "looks like an HTML or XML page, not weights"
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "looks like a pickle file, not safetensors"
    if size < 10:
        return f"is incomplete: it has only {size} bytes"
    return None


def _broken(file: Path, what: str) -> ModelError:
    return ModelError(what, file=str(file), todo="get the file again")


def _parse(file: Path, raw: bytes) -> JsonObject:
    """The header as JSON, in which the library would take a name twice."""
    try:
        header = parse_json(raw.decode("utf-8"))
    except JsonError as error:
        name = error.what.removeprefix("duplicate key ")
        what = (
            f"the header is not valid JSON ({name})" if name == error.what else f"duplicate tensor {name} in the header"
        )
        raise _broken(file, what) from error
    except UnicodeDecodeError as error:
        raise _broken(file, "the header is not valid JSON") from error
    if not isinstance(header, dict):
        raise _broken(file, "the header is not an object")
    return header


def _is_entry(value: Any) -> bool:
    """Whether what a header says of a tensor has the types that it must have, and a size that goes with them."""
    try:
        size_bytes = math.prod(value["shape"]) * DTYPE_BYTES[value["dtype"]]
        begin, end = value["data_offsets"]
        return bool(isinstance(value["shape"], list) and begin >= 0 and end - begin == size_bytes)
    except (TypeError, KeyError, ValueError):
        return False


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of one safetensors file, in the order of its data, checked without reading any data.

    Raises:
        ModelError: Missing, empty, incomplete, a pointer or a page instead of weights, or a header that lies.
    """
    from safetensors import SafetensorError, safe_open

    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(512)
            if looks := _look(head, size):
                raise _broken(file, looks)
            length = int.from_bytes(head[:8], "little")
            if length > HEADER_LIMIT_BYTES:
                raise _broken(file, f"the header claims {length} bytes; no safetensors file")
            if 8 + length > size:
                raise _broken(file, f"is incomplete: it ends inside the header ({size} bytes)")
            stream.seek(8)
            header = _parse(file, stream.read(length))
        header.pop("__metadata__", None)
        if wrong := [name for name, value in header.items() if not _is_entry(value)]:
            raise _broken(file, f"the header's entry for '{wrong[0]}' is wrong: dtype, shape and bytes do not agree")
        with safe_open(file, "np"):  # holes and overlaps; maps the file, and reads no more of it
            pass
    except FileNotFoundError as error:
        raise _broken(file, "does not exist") from error
    except OSError as error:
        raise _broken(file, f"cannot be read ({error.strerror})") from error
    except SafetensorError as error:
        what = f"the header is wrong: {str(error).rpartition('header: ')[2]}"
        if "not fully covered" in what:
            missing = 8 + length + max((value["data_offsets"][1] for value in header.values()), default=0) - size
            more = "more bytes follow than its header tells of"
            what = f"is incomplete: {missing} bytes are missing" if missing > 0 else more
        raise _broken(file, what) from error
    entries = {}
    for name, value in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = value["data_offsets"]
        entries[name] = TensorEntry(name, file, value["dtype"], tuple(value["shape"]), 8 + length + begin, end - begin)
    return entries


def refuse_pickles(folder: Path, names: Sequence[str]) -> None:
    """Raises SafetyError where a folder holds a file of one of these names, in the place of safetensors."""
    for name in names:
        if (folder / name).exists():
            what = f"{name} is a pickle file, which can run code and is never opened"
            raise SafetyError(what, file=str(folder), todo="use weights in safetensors format")


def _shards(folder: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The weight files of a folder and the index's tensor -> file (empty for a single file)."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    index = folder / INDEX
    if not index.is_file():
        refuse_pickles(folder, _PICKLES)
        raise ModelError(f"holds no weights ({SINGLE} or {INDEX})", file=str(folder), todo="get the whole model folder")
    try:
        weight_map = read_json_file(index)["weight_map"]
        names = sorted(set(weight_map.values()))
        paths = [PurePosixPath(name) for name in names]
    except (JsonError, KeyError, TypeError, AttributeError) as error:
        why = f": {error.what}" if isinstance(error, JsonError) else " (weight_map)"
        raise _broken(index, f"is no valid index{why}") from error
    for name, path in zip(names, paths, strict=True):
        if path.is_absolute() or ".." in path.parts or "\\" in str(path):
            raise SafetyError(
                f"names a file outside the model folder: {name}", file=str(index), todo="do not use this model"
            )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:3])}",
            file=str(folder),
            todo="get the whole model folder",
        )
    return [folder / name for name in names], weight_map


def read_index(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model folder by name, from the headers of its safetensors files.

    Raises:
        ModelError: No weights, a missing shard, a tensor the index promises and no shard holds, one in two shards.
        SafetyError: Only pickle files, or an index that points outside the folder.
    """
    files, weight_map = _shards(folder)
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise _broken(file, f"duplicate tensor '{name}', also in {entries[name].file.name}")
            entries[name] = entry
    absent = [name for name in weight_map if name not in entries]
    if absent:
        raise ModelError(
            f"{len(absent)} missing tensors that {INDEX} names: {', '.join(absent[:3])}",
            file=str(folder),
            todo="get the whole model folder",
        )
    return entries


def main_dtype(entries: Mapping[str, TensorEntry]) -> str:
    """The floating dtype that most values of a model are stored in, e.g. `BF16`; `F32` where there are none."""
    sizes = Counter({"F32": 0})
    for entry in entries.values():
        if entry.dtype in FLOAT_DTYPES:
            sizes[entry.dtype] += entry.elements
    return sizes.most_common(1)[0][0]


def read_rows(
    entry: AnyEntry, start: int = 0, stop: int | None = None, into: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows `start` to `stop` of a tensor (all of it by default) in the file's dtype: `[stop - start, ...]`.

    Args:
        into: Memory to read into, where it has that shape and dtype and is contiguous; it is returned then.

    Raises:
        ModelError: The file ended early.
    """
    import torch

    stop = entry.rows if stop is None else stop
    if isinstance(entry, StackedEntry):
        return _read_stacked(entry, start, stop)
    row_bytes = entry.row_elements * DTYPE_BYTES[entry.dtype]
    shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
    dtype = torch_dtype(entry.dtype)
    fits = into is not None and into.dtype == dtype and into.shape == shape and into.is_contiguous()
    values = into if into is not None and fits else torch.empty(shape, dtype=dtype)
    view: Any = bytes_of(values)
    descriptor = os.open(entry.file, os.O_RDONLY)
    try:
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], entry.offset + start * row_bytes + done)
            if count == 0:
                raise _broken(entry.file, f"ended while '{entry.name}' was read")
            done += count
    finally:
        os.close(descriptor)
    return values


def _read_stacked(entry: StackedEntry, start: int, stop: int) -> torch.Tensor:
    import torch

    first, found = 0, []
    for part in entry.parts:
        low, high = max(start, first), min(stop, first + part.rows)
        if low < high:
            found.append(read_rows(part, low - first, high - first))
        first += part.rows
    return torch.cat(found)


def row_blocks(
    rows: int, row_elements: int, *, multiple: int = 1, elements: int | None = None
) -> Iterator[tuple[int, int]]:
    """Stretches of whole rows.

    Args:
        rows: Of the tensor.
        row_elements: Values in each.
        multiple: All stretches but the last hold a multiple of so many values.
        elements: About as many values as a stretch holds; BLOCK_ELEMENTS if left out.
    """
    step = multiple // math.gcd(row_elements, multiple) if row_elements else 1
    height = max(1, (elements or BLOCK_ELEMENTS) // max(1, row_elements) // step) * step
    for start in range(0, rows, height):
        yield start, min(rows, start + height)


def bytes_of(values: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied; writing to them changes it."""
    import torch

    return memoryview(values.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def build_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Length and JSON header of a safetensors file that holds these (name, dtype, shape) in this order."""
    header: JsonObject = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
