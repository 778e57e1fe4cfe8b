"""Prepared rows on disk, read as memory maps: a million rows cost a few numbers each in memory, and their tokens none.

tokens.int32      ┌── row 0 ──┬─── row 1 ───┬─ row 2 ─┐     token ids, one behind the other
trained.uint8     │0 0 0 1 1 1│0 0 1 1 1 1 1│0 1 1 1 1│     1 = to be predicted
offsets.int64     0           6            13        18     where rows begin, and the end
trained_counts.int32, lines.int64, sources.int32, hashes.uint64      one number a row
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
}


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
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    lines: NDArray[np.int64]
    sources: NDArray[np.int32]
    hashes: NDArray[np.uint64]


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
    )


def _hash_row(ids: NDArray[np.int32]) -> int:
    return int.from_bytes(hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=8).digest(), "little")


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
        for name in ("tokens", "trained", "lines", "sources", "hashes"):
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
        self._tokens, self._trained = self._map("tokens"), self._map("trained")

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
        return Example(index, self._tokens[start:end], self._trained[start:end], file, int(self.lines[index]))

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
        for values in (self._tokens, self._trained):
            for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
                digest.update(values[self._starts[first] : self._ends[last]])
        return digest.hexdigest()
