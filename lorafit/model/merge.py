"""An adapter into its base's weights, tensor by tensor, a few MiB at a time, checked against what was written.

    base shard --rows--> W  (as the file has it, or the quantised values that training saw, proven by the run's hashes)
    adapter    --------> s * B A
                         W + s * B A in fp32, rounded once --> output shard --read back--> equal to W + s * B A (fp64)?

Never a 4-bit result: quantising a merged weight again would erase the adapter, whose update is finer than a 4-bit step.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from lorafit.errors import ModelError, NumericsError, ResourceError, UsageError
from lorafit.model.adapter import NOTES, AdapterFolder, check_base, read_adapter
from lorafit.model.check import list_names
from lorafit.model.inspect import digest_of
from lorafit.model.rebuild import REBUILDERS, FourBitRows, Int8Rows, PlainRows, compare_proof, row_blocks
from lorafit.model.updates import Update, find_weight, plan_updates
from lorafit.model.weights import (
    FLOAT_DTYPES,
    INDEX,
    TensorEntry,
    build_header,
    dtype_name,
    read_header,
    read_index,
    read_rows,
    torch_dtype,
)
from lorafit.rundir import atomic_dir, disk_errors

if TYPE_CHECKING:
    import torch

    from lorafit.contracts import Reporter
    from lorafit.model.base import Base

BaseKind = Literal["dequantized", "original"]
ALLOWED_DIFFERENCE = 1e-5
"""Share of codes that may be one level off where the run was trained on another kind of device."""

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.spm", "LICENSE*")
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
_UNIT_ROUNDOFF = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24, "F64": 2.0**-53}
_SMALLEST = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149, "F64": 2.0**-1074}


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did.

    Attributes:
        kind: The base that was merged into.
        tensors: Tensors written.
        merged_tensors: Of those, the ones that got an update.
        rebuilt_tensors: Of those, the ones taken as training's quantised values.
        proven: Whether the rebuilt base was compared with hashes of the run.
        codes_off: Codes one level off, on another kind of device than the run's.
        verified: Whether every written tensor was read back and compared.
        largest_error: Largest |written - exact| over its bound, 0 to 1; 0 where not verified.
    """

    output: Path
    kind: BaseKind
    tensors: int
    merged_tensors: int
    rebuilt_tensors: int
    written_bytes: int
    proven: bool
    codes_off: int
    verified: bool
    largest_error: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values; the output by its name."""
        return {**asdict(self), "output": self.output.name}

    def describe(self) -> list[str]:
        """For people, line by line."""
        size = self.written_bytes / 2**20
        what = f"merged {self.merged_tensors} of {self.tensors} tensors into the {self.kind} base"
        lines = [f"{what}: {self.output}, {size:,.0f} MiB in {self.seconds:.1f} s"]
        if self.proven:
            off = f", {self.codes_off} codes one level off" if self.codes_off else ""
            lines.append(f"{self.rebuilt_tensors} quantised tensors rebuilt and proven to be the run's{off}")
        if self.verified:
            lines.append(
                f"every tensor read back: equal to W + s B A within {self.largest_error:.2f} of its rounding bound"
            )
        return lines


def merge_adapter(
    base: Base,
    adapter_folder: Path,
    output: Path,
    *,
    kind: BaseKind,
    quantization: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    check: Callable[[Path], None] | None = None,
    reporter: Reporter,
) -> MergeReport:
    """Writes base + adapter as a model folder that plain transformers loads.

    Args:
        base: The base that the adapter was trained on.
        adapter_folder: In PEFT's layout. Tokenizer files and chat template in it win over the base's.
        output: The folder to make; it may exist, empty.
        kind: `dequantized`: the quantised values that training saw. `original`: the base's own weights.
        quantization: The run's quantization.json (`inspect.describe_quantization`); needed for `dequantized`.
        dtype: Of all written floats; by default training's own for `dequantized`, the file's for `original`.
        verify: Whether each written tensor is read back and compared with W + s * B A.
        check: Called with the finished folder before it gets its name; what it raises leaves no output.
        reporter: Shows progress.

    Raises:
        UsageError: The output is an input, lies inside one, or is not empty.
        ModelError: The adapter cannot be merged as a plain update, or does not fit the base.
        NumericsError: The rebuilt base is not the one of the run, or a written tensor is not W + s * B A.
        ResourceError: The disk is too small.
    """
    started = time.monotonic()
    _check_output(output, base.path, adapter_folder)
    adapter = read_adapter(adapter_folder)
    check_base(adapter, base)
    entries = read_index(base.path)
    updates = plan_updates(adapter, entries, base.config)
    used = _check_quantization(kind, quantization, base)
    if dtype is None and used is not None:
        import torch

        dtype = getattr(torch, used["weights_dtype"])
    writer = _Writer(entries, updates, used, None if dtype is None else dtype_name(dtype), verify=verify)
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if free < writer.total_bytes:
        raise ResourceError(
            f"the merged model takes {writer.total_bytes / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB left",
            file=str(output),
            todo="choose an output on another disk",
        )
    with atomic_dir(output, replace=output.exists()) as temporary:
        with reporter.track(len(entries), "merging") as bar:
            for _ in writer.write(temporary):
                bar.advance()
        codes_off, proven = writer.conclude(reporter)
        _copy_rest(base, adapter_folder, temporary, writer)
        _write_notes(temporary, base, adapter, kind, used)
        if check is not None:
            check(temporary)
    return MergeReport(
        output=output,
        kind=kind,
        tensors=len(entries),
        merged_tensors=len(updates),
        rebuilt_tensors=len(writer.rebuilt),
        written_bytes=writer.total_bytes,
        proven=proven,
        codes_off=codes_off,
        verified=verify,
        largest_error=writer.largest_error,
        seconds=time.monotonic() - started,
    )


def _check_output(output: Path, base: Path, adapter: Path) -> None:
    made = output.resolve()
    for source in (base.resolve(), adapter.resolve()):
        if made == source or source in made.parents or made in source.parents:
            raise UsageError("the output is also an input, or lies inside one", file=str(output), todo="choose another")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError("the output exists and is not empty", file=str(output), todo="choose another, or remove it")


def _check_quantization(kind: BaseKind, quantization: Mapping[str, Any] | None, base: Base) -> Mapping[str, Any] | None:
    if kind == "original":
        return None
    if not quantization or quantization.get("kind") not in REBUILDERS or "tensors" not in quantization:
        raise ModelError(
            "nothing is known of how training quantised this base, so it cannot be rebuilt",
            file=str(base.path),
            todo="merge a run folder, or merge with --base original",
        )
    return quantization


class _Writer:
    """Writes every shard of the base anew, and checks what it wrote."""

    def __init__(
        self,
        entries: Mapping[str, TensorEntry],
        updates: Mapping[str, Update],
        used: Mapping[str, Any] | None,
        dtype: str | None,
        *,
        verify: bool,
    ) -> None:
        self._entries, self._updates, self._used, self._verify = entries, updates, used, verify
        proofs = (used or {}).get("tensors", {})
        found = {path: find_weight(path, entries) for path in proofs}
        lost = [path for path, name in found.items() if name is None]
        if lost:
            raise ModelError(f"{len(lost)} layers that training quantised are not in the base: {list_names(lost)}")
        self.rebuilt = {str(name): (path, proofs[path]) for path, name in found.items()}
        self._proofs: dict[str, Mapping[str, Any]] = {}
        self._codes_off = 0
        self.largest_error = 0.0
        self.dtypes = {n: dtype if dtype and e.dtype in FLOAT_DTYPES else e.dtype for n, e in entries.items()}
        sizes = {n: e.elements * torch_dtype(self.dtypes[n]).itemsize for n, e in entries.items()}
        self.total_bytes = sum(sizes.values())

    def write(self, folder: Path) -> Iterator[str]:
        """Writes all shards into `folder`, yielding each tensor's name when it is done."""
        files = dict.fromkeys(entry.file for entry in self._entries.values())
        for source in files:
            entries = sorted(read_header(source).values(), key=lambda entry: entry.offset)
            header = build_header([(e.name, self.dtypes[e.name], e.shape) for e in entries])
            target = folder / source.name
            with target.open("wb", buffering=0) as stream:
                _write_all(stream, header)
                offset = len(header)
                for entry in entries:
                    written = TensorEntry(entry.name, target, self.dtypes[entry.name], entry.shape, offset, 0)
                    offset += self._write_tensor(stream, entry, written)
                    yield entry.name
        if len(files) > 1 or (next(iter(files)).parent / INDEX).is_file():
            weight_map = {name: entry.file.name for name, entry in sorted(self._entries.items())}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _write_tensor(self, stream: BinaryIO, entry: TensorEntry, written: TensorEntry) -> int:
        rows = self._rows(entry)
        update = self._updates.get(entry.name)
        factors = update.factors() if update else None
        scaling = update.scaling if update else 0.0
        size = self._write_rows(stream, entry, rows, torch_dtype(written.dtype), factors, scaling)
        if self._verify:
            self._check(rows, written, factors, scaling)
        return size

    def _write_rows(
        self,
        stream: BinaryIO,
        entry: TensorEntry,
        rows: PlainRows | FourBitRows | Int8Rows,
        dtype: torch.dtype,
        factors: tuple[torch.Tensor, torch.Tensor] | None,
        scaling: float,
    ) -> int:
        size = 0
        for start, stop in row_blocks(entry.rows, entry.row_elements):
            values = rows.read(start, stop)
            if factors is not None:
                values = values.float().addmm(factors[0][start:stop], factors[1], alpha=scaling)
            size += _write_all(stream, _bytes_of(values.to(dtype)))
        return size

    def _rows(self, entry: TensorEntry) -> PlainRows | FourBitRows | Int8Rows:
        if self._used is None or entry.name not in self.rebuilt:
            return PlainRows(entry)
        path, proof = self.rebuilt[entry.name]
        rows = REBUILDERS[self._used["kind"]](entry, self._used, proof)
        same = self._used.get("device") == "cpu"
        self._codes_off += compare_proof(entry.name, rows.proof, proof, same_device=same)
        self._proofs[path] = rows.proof
        return rows

    def _check(
        self,
        rows: PlainRows | FourBitRows | Int8Rows,
        written: TensorEntry,
        factors: tuple[torch.Tensor, torch.Tensor] | None,
        scaling: float,
    ) -> None:
        """Reads a tensor back from the output file and compares it with W + s * B A in fp64.

        |written - exact| <= u |exact| + (r + 2) 2^-24 (|W| + s |B_i| |A_j|) + smallest, u the dtype's unit roundoff:
        one rounding to the dtype, and the rounding errors of an fp32 product of r terms and a sum (Higham 2002,
        Accuracy and Stability, section 3.5). A tensor without an update must be equal to the cast one, bit for bit.
        """
        for start, stop in row_blocks(written.rows, written.row_elements):
            source, got = rows.read(start, stop), read_rows(written, start, stop)
            if factors is None:
                if _bytes_of(got) != _bytes_of(source.to(got.dtype)):
                    raise self._mismatch(written, "its bytes differ from the base's")
                continue
            left, right = factors[0][start:stop].double(), factors[1].double()
            exact = source.double().addmm(left, right, alpha=scaling)
            size = source.double().abs_().addmm_(left.norm(dim=1)[:, None], right.norm(dim=0)[None], alpha=abs(scaling))
            bound = size.mul_((right.shape[0] + 2) * 2.0**-24).add_(exact.abs(), alpha=_UNIT_ROUNDOFF[written.dtype])
            ratio = exact.sub_(got.double()).abs_().div_(bound.add_(_SMALLEST[written.dtype]))
            worst = float(ratio.max())
            if not worst <= 1.0:  # NaN fails as well
                raise self._mismatch(written, f"it is {worst:.3g} times the rounding bound away from W + s * B A")
            self.largest_error = max(self.largest_error, worst)

    def _mismatch(self, written: TensorEntry, why: str) -> NumericsError:
        return NumericsError(
            f"a written tensor is wrong: {why}", key=written.name, todo="nothing was kept; check the disk"
        )

    def conclude(self, reporter: Reporter) -> tuple[int, bool]:
        """(codes off, whether the base was proven), once all is written.

        Raises:
            NumericsError: More codes are off than another kind of device explains.
        """
        if self._used is None:
            return 0, False
        total = sum(self._entries[name].elements for name in self.rebuilt)
        if self._codes_off > ALLOWED_DIFFERENCE * total:
            raise NumericsError(
                f"{self._codes_off} of {total} codes of the rebuilt base differ from the run's",
                todo="use the run's own base files; else merge with --base original",
            )
        if self._codes_off:
            reporter.warn(
                f"{self._codes_off} of {total} codes are one level off: trained on {self._used.get('device')}"
            )
        elif self._used.get("digest") not in (None, digest_of(self._proofs)):
            raise NumericsError(
                "the rebuilt base has another digest than the run's", todo="use the run's own base files"
            )
        return self._codes_off, True


def _bytes_of(values: torch.Tensor) -> memoryview:
    import torch

    return memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write_all(stream: BinaryIO, data: bytes | memoryview) -> int:
    """Writes every byte: an unbuffered write may take fewer than it was given."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += stream.write(view[done:])
    return done


def _copy_rest(base: Base, adapter: Path, target: Path, writer: _Writer) -> None:
    """config.json without quantisation and with the new dtype; tokenizer, template and licence as they are."""
    for folder in (base.path, adapter):
        for file in (found for pattern in _COPIED for found in sorted(folder.glob(pattern))):
            ours = file.name in ("config.json", NOTES, "adapter_config.json") or file.name.endswith(_WEIGHT_SUFFIXES)
            if not ours and file.is_file():
                shutil.copyfile(file, target / file.name)
    config = {key: value for key, value in base.config.items() if key not in ("quantization_config", "torch_dtype")}
    floats = {dtype for dtype in writer.dtypes.values() if dtype in FLOAT_DTYPES}
    if len(floats) == 1:
        config["dtype"] = str(torch_dtype(floats.pop())).removeprefix("torch.")
    elif "torch_dtype" in base.config:
        config.setdefault("dtype", base.config["torch_dtype"])
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_notes(
    target: Path, base: Base, adapter: AdapterFolder, kind: BaseKind, used: Mapping[str, Any] | None
) -> None:
    """lorafit.json of the merged model: what it was made from."""
    quantization = {key: value for key, value in (used or {}).items() if key != "tensors"} or None
    notes = {
        "format": 1,
        "merged": {"base": {"name": base.name, "digest": base.digest}, "into": kind, "quantization": quantization},
        "adapter": {"name": adapter.path.name, "r": adapter.config.get("r"), "alpha": adapter.config.get("lora_alpha")},
    }
    (target / NOTES).write_text(json.dumps(notes, indent=2, sort_keys=True) + "\n", encoding="utf-8")
