"""The shards of a merged model: every tensor of the base, updated where the adapter has an update, checked as written.

this thread        rows of W (from the file, or rebuilt), folded   ──blocks──┐
checking thread                 the fold in fp64 == what can be read ?    <──┤
writing threads                                hash │ write │ fsync       <──┘
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lorafit.contracts import Progress, Reporter
from lorafit.errors import NumericsError
from lorafit.files.safetensors import (
    FLOAT_DTYPES,
    INDEX,
    TensorEntry,
    build_header,
    read_rows,
    row_blocks,
    torch_dtype,
)
from lorafit.model.merge.background_writer import BackgroundWriter
from lorafit.model.merge.merge_targets import Updates
from lorafit.model.merge.sources import Source, Sources, Values

ALLOWED_DIFFERENCE = 1e-5
"""Share of codes that may be one level off where the run was trained on another kind of device."""
_TENSORS_BEHIND = 1
"""Tensors that may wait for their check beside the one that is written; each may hold a rebuilt weight."""


class ShardMerger:
    """Writes every shard of the base anew, and checks what it wrote.

    Args:
        entries: The base's tensors.
        updates: The adapter's.
        values: How what is written is made.
        verify: Whether each written tensor is read back and compared.

    Attributes:
        dtypes: What each tensor is written in.
        cast_dtypes: Of those, what tensors have that are not kept as they are.
        total_bytes: Of all of them.
        rebuilt: Paths of the layers whose quantised values are made again.
        digests: SHA-256 of the written files by name, filled by `write`.
        largest_error: Largest |written - exact| over its bound, 0 to 1.
    """

    def __init__(self, entries: Mapping[str, TensorEntry], updates: Updates, values: Values, *, verify: bool) -> None:
        self._entries, self._verify = entries, verify
        self._sources = Sources(entries, updates, values)
        self.rebuilt = list(values.quantised) if values.used is not None else []
        self.largest_error = 0.0
        self.digests: dict[str, str] = {}
        self.dtypes = {
            name: values.dtype
            if values.dtype and entry.dtype in FLOAT_DTYPES and name not in values.kept
            else entry.dtype
            for name, entry in entries.items()
        }
        self.cast_dtypes = {dtype for name, dtype in self.dtypes.items() if name not in values.kept}
        self.total_bytes = sum(e.elements * torch_dtype(self.dtypes[n]).itemsize for n, e in entries.items())

    def write(self, folder: Path, progress: Progress) -> None:
        """Writes all shards into `folder`, so that they are on the disk afterwards.

        Raises:
            NumericsError: A rebuilt weight is not the run's, or a written one is not what it must be.
            OSError: The disk is full or broken.
        """
        files: dict[Path, list[TensorEntry]] = {}
        for entry in self._entries.values():
            files.setdefault(entry.file, []).append(entry)
        behind: deque[Future[None]] = deque()
        with (
            _one_thread(self._sources.rebuilder is None),
            BackgroundWriter() as writer,
            ThreadPoolExecutor(1) as checking,
        ):
            for source, entries in files.items():
                entries.sort(key=lambda entry: entry.offset)
                header = build_header([(e.name, self.dtypes[e.name], e.shape) for e in entries])
                target, offset = folder / source.name, len(header)
                writer.begin(target)
                last = writer.put(header)
                for entry in entries:
                    matrix = entry.as_matrix()
                    written = TensorEntry(entry.name, target, self.dtypes[entry.name], matrix.shape, offset, 0)
                    sources = self._sources.of(entry.name)
                    for block in self._blocks(sources, written, writer):
                        last = writer.put(block)
                        offset += block.numel()
                    if self._verify:
                        behind.append(checking.submit(self._check_written, last, sources, written))
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

    def _blocks(self, sources: Sequence[Source], written: TensorEntry, writer: BackgroundWriter) -> Iterator[Any]:
        """The bytes of a tensor as they are written, in memory of the writer's."""
        dtype = torch_dtype(written.dtype)
        for source in sources:
            first, count = source.stretch.first, source.stretch.stop - source.stretch.start
            for start, stop in row_blocks(count, written.row_elements):
                block = writer.take_block((stop - start) * written.row_elements * dtype.itemsize)
                out = block.view(dtype).view((stop - start, *written.shape[1:]) if written.shape else ())
                values = source.rows.read(first + start, first + stop, out)
                if source.fold is not None:
                    source.fold.apply(values, start, out)
                elif values is not out:
                    out.copy_(values)
                yield block

    def _check_written(self, last_write: Future[None], sources: Sequence[Source], written: TensorEntry) -> None:
        last_write.result()
        for source in sources:
            self._check(source, written)

    def _check(self, source: Source, written: TensorEntry) -> None:
        """Reads a stretch back from the output file and compares it with what its fold is in fp64.

        One without a change must be equal to the cast one, bit for bit.
        """
        base_dtype, dtype = torch_dtype(self._entries[written.name].dtype), torch_dtype(written.dtype)
        stretch = source.stretch
        into: tuple[torch.Tensor, torch.Tensor] | None = None
        for start, stop in row_blocks(stretch.stop - stretch.start, written.row_elements):
            shape = (stop - start, *written.shape[1:]) if written.shape else ()
            if into is None or into[0].shape != shape:  # the last block may be lower
                into = torch.empty(shape, dtype=base_dtype), torch.empty(shape, dtype=dtype)
            values = source.rows.read(stretch.first + start, stretch.first + stop, into[0])
            got = read_rows(written, stretch.start + start, stretch.start + stop, into[1])
            if source.fold is None:
                if not torch.equal(_as_bytes(got), _as_bytes(values.to(got.dtype))):
                    raise _mismatch(written, "its bytes differ from the base's")
                continue
            worst = source.fold.error(values, got, start)
            if not worst <= 1.0:
                raise _mismatch(written, f"it is {worst:.3g} times the rounding bound away from what was to be merged")
            self.largest_error = max(self.largest_error, worst)

    def conclude(self, reporter: Reporter) -> tuple[int, bool]:
        """(codes off, whether the base was proven), once all is written.

        Raises:
            NumericsError: More codes are off than another kind of device explains.
        """
        if self._sources.rebuilder is None:
            return 0, False
        return self._sources.rebuilder.conclude(ALLOWED_DIFFERENCE, reporter), True


@contextlib.contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """Keeps torch to one thread a caller where the arithmetic is less work than hashing, which has a thread beside it.

    More threads would only take the cores from those that hash, write and check.
    """
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _as_bytes(values: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8, in which NaN equals NaN and 0 is not -0."""
    return values.reshape(-1).view(torch.uint8)


def _mismatch(written: TensorEntry, why: str) -> NumericsError:
    return NumericsError(f"a written tensor is wrong: {why}", key=written.name, todo="nothing was kept; check the disk")
