"""The shards of a merged model: every tensor of the base, updated where the adapter has an update, checked as written.

this thread        rows of W (from the file, or rebuilt) + s * B A ──blocks──┐
checking thread                 W + s * B A in fp64 == what can be read ? <──┤
writing threads                                hash │ write │ fsync       <──┘
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.errors import ModelError, NumericsError
from lorafit.model.addition import Addition, Factors, Proof
from lorafit.model.background import BackgroundWriter
from lorafit.model.check import list_names
from lorafit.model.inspect import digest_of
from lorafit.model.rebuild import REBUILDERS, FourBitRows, Int8Rows, PlainRows, compare_proof, row_blocks
from lorafit.model.updates import Update, find_weight
from lorafit.model.weights import (
    FLOAT_DTYPES,
    INDEX,
    TensorEntry,
    build_header,
    read_header,
    read_rows,
    torch_dtype,
)

if TYPE_CHECKING:
    import torch

    from lorafit.contracts import Progress, Reporter

ALLOWED_DIFFERENCE = 1e-5
"""Share of codes that may be one level off where the run was trained on another kind of device."""
_TENSORS_BEHIND = 1
"""Tensors that may wait for their check beside the one that is written; each may hold a rebuilt weight."""

Rows = PlainRows | FourBitRows | Int8Rows


class ShardMerger:
    """Writes every shard of the base anew, and checks what it wrote.

    Args:
        entries: The base's tensors.
        updates: The adapter's, by the weight they belong to.
        used: The run's quantization.json where the weights are those that training saw; None for the file's own.
        dtype: safetensors' name of what floats are written in; the file's where None.
        verify: Whether each written tensor is read back and compared.

    Attributes:
        dtypes: What each tensor is written in.
        total_bytes: Of all of them.
        rebuilt: Name -> (layer's path, the run's proof) of the quantised ones.
        digests: SHA-256 of the written files by name, filled by `write`.
        largest_error: Largest |written - exact| over its bound, 0 to 1.
    """

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
        self.digests: dict[str, str] = {}
        self.dtypes = {n: dtype if dtype and e.dtype in FLOAT_DTYPES else e.dtype for n, e in entries.items()}
        self.total_bytes = sum(e.elements * torch_dtype(self.dtypes[n]).itemsize for n, e in entries.items())

    def write(self, folder: Path, progress: Progress) -> None:
        """Writes all shards into `folder`, so that they are on the disk afterwards.

        Raises:
            NumericsError: A rebuilt weight is not the run's, or a written one is not W + s * B A.
            OSError: The disk is full or broken.
        """
        files = dict.fromkeys(entry.file for entry in self._entries.values())
        behind: deque[Future[None]] = deque()
        with _one_thread(self._used is None), BackgroundWriter() as writer, ThreadPoolExecutor(1) as checking:
            for source in files:
                entries = sorted(read_header(source).values(), key=lambda entry: entry.offset)
                header = build_header([(e.name, self.dtypes[e.name], e.shape) for e in entries])
                target, offset = folder / source.name, len(header)
                writer.begin(target)
                last = writer.put(header)
                for entry in entries:
                    written = TensorEntry(entry.name, target, self.dtypes[entry.name], entry.shape, offset, 0)
                    rows, factors = self._rows(entry), self._factors(entry.name)
                    for block in self._blocks(rows, written, factors, writer):
                        last = writer.put(block)
                        offset += block.numel()
                    if self._verify:
                        behind.append(checking.submit(self._check_written, last, rows, written, factors))
                    while len(behind) > _TENSORS_BEHIND:
                        behind.popleft().result()
                    progress.advance()
            for checked in behind:
                checked.result()
        self.digests.update(writer.digests)
        if len(files) > 1 or (next(iter(files)).parent / INDEX).is_file():
            weight_map = {name: entry.file.name for name, entry in sorted(self._entries.items())}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _rows(self, entry: TensorEntry) -> Rows:
        if self._used is None or entry.name not in self.rebuilt:
            return PlainRows(entry)
        path, proof = self.rebuilt[entry.name]
        rows = REBUILDERS[self._used["kind"]](entry, self._used, proof)
        same = self._used.get("device") == "cpu"
        self._codes_off += compare_proof(entry.name, rows.proof, proof, same_device=same)
        self._proofs[path] = rows.proof
        return rows

    def _factors(self, name: str) -> Factors | None:
        update = self._updates.get(name)
        return update.factors() if update else None

    def _blocks(
        self, rows: Rows, written: TensorEntry, factors: Factors | None, writer: BackgroundWriter
    ) -> Iterator[Any]:
        """The bytes of a tensor as they are written, in memory of the writer's."""
        dtype = torch_dtype(written.dtype)
        addition = Addition(factors) if factors else None
        for start, stop in row_blocks(written.rows, written.row_elements):
            block = writer.take_block((stop - start) * written.row_elements * dtype.itemsize)
            out = block.view(dtype).view((stop - start, *written.shape[1:]) if written.shape else ())
            values = rows.read(start, stop, out)
            if addition is not None:
                addition.add(values, start, out)
            elif values is not out:
                out.copy_(values)
            yield block

    def _check_written(
        self, last_write: Future[None], rows: Rows, written: TensorEntry, factors: Factors | None
    ) -> None:
        last_write.result()
        self._check(rows, written, factors)

    def _check(self, rows: Rows, written: TensorEntry, factors: Factors | None) -> None:
        """Reads a tensor back from the output file and compares it with W + s * B A (see `Proof`).

        A tensor without an update must be equal to the cast one, bit for bit.
        """
        import torch

        proof = Proof(factors, written.dtype) if factors else None
        base_dtype, dtype = torch_dtype(self._entries[written.name].dtype), torch_dtype(written.dtype)
        into: tuple[torch.Tensor, torch.Tensor] | None = None
        for start, stop in row_blocks(written.rows, written.row_elements):
            shape = (stop - start, *written.shape[1:]) if written.shape else ()
            if into is None or into[0].shape != shape:  # the last block may be lower
                into = torch.empty(shape, dtype=base_dtype), torch.empty(shape, dtype=dtype)
            source, got = rows.read(start, stop, into[0]), read_rows(written, start, stop, into[1])
            if proof is None:
                if not torch.equal(_as_bytes(got), _as_bytes(source.to(got.dtype))):
                    raise _mismatch(written, "its bytes differ from the base's")
                continue
            worst = proof.compare(source, got, start)
            if not worst <= 1.0:
                raise _mismatch(written, f"it is {worst:.3g} times the rounding bound away from W + s * B A")
            self.largest_error = max(self.largest_error, worst)

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


@contextlib.contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """Keeps torch to one thread a caller where the arithmetic is less work than hashing, which has a thread beside it.

    More threads would only take the cores from those that hash, write and check.
    """
    import torch

    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _as_bytes(values: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8, in which NaN equals NaN and 0 is not -0."""
    import torch

    return values.reshape(-1).view(torch.uint8)


def _mismatch(written: TensorEntry, why: str) -> NumericsError:
    return NumericsError(f"a written tensor is wrong: {why}", key=written.name, todo="nothing was kept; check the disk")
