"""Prepared rows on disk: a million of them cost a few numbers each in memory, and their tokens none.

Numbers of rows are memory maps. Tokens are read where they lie, a row at a time: pages of a map that was touched count
as the process's memory, and an epoch touches all of them.

tokens.int32      ┌── row 0 ──┬─── row 1 ───┬─ row 2 ─┐     token ids, one behind the other
trained.uint8     │0 0 0 1 1 1│0 0 1 1 1 1 1│0 1 1 1 1│     1 = to be predicted
offsets.int64     0           6            13        18     where rows begin, and the end
trained_counts.int32, lines.int64, sources.int32, hashes.uint64, prompt_hashes.uint64      one number a row
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from lorafit.contracts import Encoded, Example

if TYPE_CHECKING:
    from numpy.typing import NDArray

DTYPES = {
    "tokens": "<i4",
    "trained": "|u1",
    "offsets": "<i8",
    "trained_counts": "<i4",
    "lines": "<i8",
    "sources": "<i4",
    "hashes": "<u8",
    "prompt_hashes": "<u8",
}
NO_PROMPT = 0
"""In place of the hash of a prompt: nothing stands before what is trained."""
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Chunk:
    """Encoded rows in a form that is cheap to hand between processes.

    Attributes:
        tokens: Ids of all rows, `[sum of lengths]`.
        trained: 0/1 for each.
        lengths: Tokens of each row.
        lines: Line of each row in its source.
        sources: Number of each row's source.
        hashes: 64 bits of a hash of each row's ids.
        prompt_hashes: The same of the ids before each row's last answer; `NO_PROMPT` where there are none.
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    lines: NDArray[np.int64]
    sources: NDArray[np.int32]
    hashes: NDArray[np.uint64]
    prompt_hashes: NDArray[np.uint64]


def pack_chunk(rows: Sequence[tuple[int, int, Encoded]]) -> Chunk:
    """Rows as (source, line, tokens) to arrays. A row's first token is never trained: nothing stands before it."""
    tokens = [np.asarray(encoded.input_ids, dtype=np.int32) for _, _, encoded in rows]
    trained = [np.asarray(encoded.trained, dtype=np.uint8) for _, _, encoded in rows]
    for flags in trained:
        flags[:1] = 0
    return Chunk(
        tokens=np.concatenate(tokens) if tokens else np.empty(0, np.int32),
        trained=np.concatenate(trained) if trained else np.empty(0, np.uint8),
        lengths=np.array([len(ids) for ids in tokens], dtype=np.int64),
        lines=np.array([line for _, line, _ in rows], dtype=np.int64),
        sources=np.array([source for source, _, _ in rows], dtype=np.int32),
        hashes=np.array([_hash_row(ids) for ids in tokens], dtype=np.uint64),
        prompt_hashes=np.array(list(map(_hash_prompt, tokens, trained)), dtype=np.uint64),
    )


def _hash_row(ids: NDArray[np.int32]) -> int:
    return int.from_bytes(hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=8).digest(), "little")


def _hash_prompt(ids: NDArray[np.int32], trained: NDArray[np.uint8]) -> int:
    """Hash of what stands before the last stretch of trained tokens; a first token alone is no prompt."""
    places = np.flatnonzero(trained)
    gaps = np.flatnonzero(np.diff(places) > 1)
    start = int(places[gaps[-1] + 1] if len(gaps) else places[0]) if len(places) else 0
    return _hash_row(ids[:start]) if start > 1 else NO_PROMPT


class StoreWriter:
    """Appends chunks to the files of a store; holds one chunk at a time.

    Args:
        folder: An existing folder, e.g. the one that `atomic_dir` yields.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, BinaryIO] = {name: _file(folder, name).open("wb") for name in DTYPES}
        self._end = 0
        self._write("offsets", np.zeros(1, np.int64))

    def write(self, chunk: Chunk) -> None:
        """Appends the rows of a chunk."""
        ends = np.cumsum(chunk.lengths) + self._end
        counts = np.array(
            [int(part.sum()) for part in np.split(chunk.trained, np.cumsum(chunk.lengths)[:-1])]
            if len(chunk.lengths)
            else [],
            dtype=np.int32,
        )
        for name, values in (("offsets", ends), ("trained_counts", counts)):
            self._write(name, values)
        for name in ("tokens", "trained", "lines", "sources", "hashes", "prompt_hashes"):
            self._write(name, getattr(chunk, name))
        self._end = int(ends[-1]) if len(ends) else self._end

    def _write(self, name: str, values: NDArray[Any]) -> None:
        self._files[name].write(values.astype(DTYPES[name]).tobytes())

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.{np.dtype(DTYPES[name]).name}"


def is_sound(folder: Path) -> bool:
    """Whether the files of a store belong together: as many tokens as the rows say, and a number a row in each other.

    Which tokens they are is not looked at.
    """
    try:
        counts = {name: _file(folder, name).stat().st_size / np.dtype(kind).itemsize for name, kind in DTYPES.items()}
        rows = counts["offsets"] - 1
        if rows < 0 or any(counts[name] != rows for name in ("trained_counts", "lines", "sources", "hashes")):
            return False
        offsets = np.fromfile(_file(folder, "offsets"), dtype=DTYPES["offsets"])
    except OSError:
        return False
    ends = offsets[0] == 0 and offsets[-1] == counts["tokens"] == counts["trained"]
    return bool(ends and np.all(np.diff(offsets) >= 0))


class _Column:
    """One file of a store, read piece by piece; stays readable where the file is removed meanwhile."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._file, self._dtype = path.open("rb", buffering=0), np.dtype(dtype)

    def read(self, start: int, end: int) -> NDArray[Any]:
        """Values `start` to `end`."""
        return np.frombuffer(self._bytes(start, end), dtype=self._dtype)

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """The same as stored, a MiB at a time."""
        step = _READ_BYTES // self._dtype.itemsize
        return (self._bytes(place, min(end, place + step)) for place in range(start, end, step))

    def _bytes(self, start: int, end: int) -> bytes:
        size = self._dtype.itemsize
        return os.pread(self._file.fileno(), (end - start) * size, start * size)


class ExampleSet:
    """Prepared rows by number; fulfils `contracts.Examples`.

    Args:
        folder: A store that was written whole.
        files: Name of each source, as the recipe has it.
        repeats: How often an epoch sees each source.
        rows: Numbers of the store's rows that belong to this set, ascending; all of them where None.
    """

    def __init__(
        self, folder: Path, files: Sequence[str], repeats: Sequence[float], rows: NDArray[np.int64] | None = None
    ) -> None:
        self.folder, self.files, self.repeats = folder, tuple(files), tuple(repeats)
        offsets = self._map("offsets")
        self._rows = np.arange(len(offsets) - 1, dtype=np.int64) if rows is None else rows
        self._starts, self._ends = offsets[self._rows], offsets[self._rows + 1]
        self._tokens, self._trained = (_Column(_file(folder, name), DTYPES[name]) for name in ("tokens", "trained"))

    def _map(self, name: str) -> Any:
        path = _file(self.folder, name)
        if path.stat().st_size == 0:
            return np.empty(0, dtype=DTYPES[name])
        return np.memmap(path, dtype=DTYPES[name], mode="r")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self._rows):
            raise IndexError(index)
        start, end = int(self._starts[index]), int(self._ends[index])
        file = self.files[int(self.source_of[index])]
        tokens, trained = self._tokens.read(start, end), self._trained.read(start, end)
        return Example(index, cast(Sequence[int], tokens), cast(Sequence[int], trained), file, int(self.lines[index]))

    @cached_property
    def lengths(self) -> Sequence[int]:
        """Tokens of each row, an int64 array `[rows]`."""
        lengths: Any = self._ends - self._starts
        return cast(Sequence[int], np.asarray(lengths))

    @cached_property
    def trained_counts(self) -> Sequence[int]:
        """Tokens that carry loss, of each row, an int32 array `[rows]`."""
        return cast(Sequence[int], np.asarray(self._map("trained_counts")[self._rows]))

    @cached_property
    def source_of(self) -> Sequence[int]:
        """Number of each row's source, an int32 array `[rows]`."""
        return cast(Sequence[int], np.asarray(self._map("sources")[self._rows]))

    @cached_property
    def lines(self) -> NDArray[np.int64]:
        """Line of each row in its source."""
        return np.asarray(self._map("lines")[self._rows])

    @cached_property
    def hashes(self) -> NDArray[np.uint64]:
        """64 bits of a hash of each row's ids; equal rows have equal ones."""
        return np.asarray(self._map("hashes")[self._rows])

    @cached_property
    def prompt_hashes(self) -> NDArray[np.uint64]:
        """64 bits of a hash of the ids before each row's last answer; `NO_PROMPT` where there are none."""
        return np.asarray(self._map("prompt_hashes")[self._rows])

    def select(self, rows: NDArray[np.int64]) -> ExampleSet:
        """The same store with some of the rows of this set, in their old order."""
        return ExampleSet(self.folder, self.files, self.repeats, np.sort(self._rows[rows]))

    def first(self, count: int) -> ExampleSet:
        """Its first rows."""
        return self.select(np.arange(min(count, len(self)), dtype=np.int64))

    def digest(self) -> str:
        """SHA-256 of the tokens and loss positions of all rows, in order: neither paths nor line ends matter."""
        digest = hashlib.sha256(np.asarray(self.lengths, dtype="<i8").tobytes())
        gaps = np.flatnonzero(self._starts[1:] != self._ends[:-1]) + 1
        firsts, lasts = np.append(0, gaps), np.append(gaps, len(self)) - 1
        stretches = list(zip(self._starts[firsts].tolist(), self._ends[lasts].tolist(), strict=True))
        for column in (self._tokens, self._trained):
            for start, end in stretches:
                for piece in column.pieces(start, end):
                    digest.update(piece)
        return digest.hexdigest()
