"""Prepared rows on disk: a million of them cost a few numbers each in memory, and their tokens none.

Numbers of rows are memory maps. Columns with as many values as a row has are read where they lie, a row at a time:
pages of a map that was touched count as the process's memory, and an epoch touches all of them.

tokens.int32            ┌── row 0 ──┬─── row 1 ───┬─ row 2 ─┐     a column of the task, one row behind the other
tokens_ends.int64       6           13            18              where its rows end
lengths.int32, trained_tokens.int32, lines.int64, copies.int32, sources.int32, hashes.uint64, prompt_hashes.uint64
                                                  one number a row
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lorafit.contracts import Column, Example, TaskRow

Chunk = Mapping[str, NDArray[Any]]
"""Encoded rows by file of the store, in a form that is cheap to hand between processes; ends count from the chunk's
first row."""

NO_PROMPT = 0
"""In place of the hash of a prompt: nothing stands before what is trained."""
_NUMBERS = {
    "lengths": "<i4",
    "trained_tokens": "<i4",
    "lines": "<i8",
    "copies": "<i4",
    "sources": "<i4",
    "hashes": "<u8",
    "prompt_hashes": "<u8",
}
_READ_BYTES = 1 << 20
_READ_ROWS = 1 << 14


def pack_chunk(
    rows: Sequence[tuple[int, int, TaskRow]],
    columns: Sequence[Column],
    row_tokens: Callable[[int], int] = int,
    copies: Sequence[int] | None = None,
) -> Chunk:
    """Rows as (source, line, row) to arrays; `row_tokens` is the task's, `copies` the number of each as a copy."""
    made = [row for *_, row in rows]
    numbers: dict[str, list[int]] = {
        "lengths": [row_tokens(row.tokens) for row in made],
        "trained_tokens": [row.weight if row.trained_tokens is None else row.trained_tokens for row in made],
        "lines": [line for _, line, _ in rows],
        "copies": list(copies) if copies is not None else [0] * len(rows),
        "sources": [source for source, _, _ in rows],
        "hashes": [_hash([*row.asked, *row.answered]) for row in made],
        "prompt_hashes": [_hash(row.asked) if len(row.asked) else NO_PROMPT for row in made],
    }
    chunk = {name: np.array(values, dtype=_NUMBERS[name]) for name, values in numbers.items()}
    for column in columns:
        values = [np.asarray(row.columns[column.name], dtype=column.dtype) for row in made]
        chunk[column.name] = np.concatenate(values) if values else np.empty(0, column.dtype)
        if column.width is None:
            chunk[_ends_of(column)] = np.cumsum([len(each) for each in values], dtype="<i8")
    return chunk


def _hash(ids: Sequence[int]) -> int:
    return int.from_bytes(hashlib.blake2b(np.asarray(ids, dtype="<i4").tobytes(), digest_size=8).digest(), "little")


def _ends_of(column: Column) -> str:
    return f"{column.name}_ends"


def _dtypes(columns: Sequence[Column]) -> dict[str, str]:
    """Every file of a store by name, with the type of its values."""
    ends = {_ends_of(column): "<i8" for column in columns if column.width is None}
    return {**{column.name: column.dtype for column in columns}, **ends, **_NUMBERS}


def _file(folder: Path, name: str, dtype: str) -> Path:
    return folder / f"{name}.{np.dtype(dtype).name}"


class StoreWriter(ExitStack):
    """Appends chunks to the files of a store; holds one chunk at a time.

    Args:
        folder: An existing folder, e.g. the one that `atomic_dir` yields.
        columns: The task's.
    """

    def __init__(self, folder: Path, columns: Sequence[Column]) -> None:
        super().__init__()
        self._dtypes = _dtypes(columns)
        self._files = {
            name: self.enter_context(_file(folder, name, dtype).open("wb")) for name, dtype in self._dtypes.items()
        }
        self._ends = {_ends_of(column): 0 for column in columns if column.width is None}

    def write(self, chunk: Chunk) -> None:
        """Appends the rows of a chunk."""
        for name, dtype in self._dtypes.items():
            values = chunk[name] + self._ends.get(name, 0) if name in self._ends else chunk[name]
            self._files[name].write(values.astype(dtype).tobytes())
            if name in self._ends and len(values):
                self._ends[name] = int(values[-1])


def is_sound(folder: Path, columns: Sequence[Column]) -> bool:
    """Whether the files of a store belong together: a number a row, and as many values as the rows say.

    Which values they are is not looked at.
    """
    dtypes = _dtypes(columns)
    try:
        counts = {
            name: _file(folder, name, dtype).stat().st_size / np.dtype(dtype).itemsize for name, dtype in dtypes.items()
        }
        rows = counts["lines"]
        wanted = dict.fromkeys(_NUMBERS, rows)
        for column in columns:
            wanted[column.name] = rows * (column.width or 0)
            if column.width is None:
                ends = np.fromfile(_file(folder, _ends_of(column), "<i8"), dtype="<i8")
                if not np.all(np.diff(ends, prepend=0) >= 0):
                    return False
                wanted[column.name], wanted[_ends_of(column)] = (int(ends[-1]) if len(ends) else 0), rows
    except OSError:
        return False
    return counts == wanted


class _Values:
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
        columns: The task's, with which it was written.
        files: Name of each source, as the recipe has it.
        repeats: How often an epoch sees each source.
        rows: Numbers of the store's rows that belong to this set, ascending; all of them where None.
        more: Further columns, which are not in the store, `[rows of this set, width]`.
    """

    def __init__(
        self,
        folder: Path,
        columns: Sequence[Column],
        files: Sequence[str],
        repeats: Sequence[float],
        rows: NDArray[np.int64] | None = None,
        more: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        self._more = dict(more or {})
        self.folder, self.columns, self.files, self.repeats = folder, tuple(columns), tuple(files), tuple(repeats)
        count = len(self._map("lines", "<i8"))
        self._rows = np.arange(count, dtype=np.int64) if rows is None else rows
        self._places = {column.name: self._find(column) for column in columns}
        self._values = {
            column.name: _Values(_file(folder, column.name, column.dtype), column.dtype) for column in columns
        }

    def _find(self, column: Column) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the values of each row of this set begin and end."""
        if column.width is not None:
            return self._rows * column.width, (self._rows + 1) * column.width
        ends = np.append(self._map(_ends_of(column), "<i8"), 0)  # the last one is also what is before the first
        return ends[self._rows - 1], ends[self._rows]

    def _map(self, name: str, dtype: str) -> Any:
        path = _file(self.folder, name, dtype)
        if path.stat().st_size == 0:
            return np.empty(0, dtype=dtype)
        return np.memmap(path, dtype=dtype, mode="r")

    def _numbers(self, name: str) -> NDArray[Any]:
        return np.asarray(self._map(name, _NUMBERS[name])[self._rows])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self._rows):
            raise IndexError(index)
        columns = {
            name: cast(Sequence[float], self._values[name].read(int(starts[index]), int(ends[index])))
            for name, (starts, ends) in self._places.items()
        }
        columns |= {name: cast(Sequence[float], values[index]) for name, values in self._more.items()}
        return Example(index, columns, self.files[int(self.source_of[index])], int(self.lines[index]))

    @cached_property
    def lengths(self) -> Sequence[int]:
        """Tokens that each row takes in a micro-batch, an int64 array `[rows]`."""
        return cast(Sequence[int], self._numbers("lengths").astype(np.int64))

    @cached_property
    def trained_tokens(self) -> Sequence[int]:
        """Tokens of each row that carry loss, an int32 array `[rows]`."""
        return cast(Sequence[int], self._numbers("trained_tokens"))

    @cached_property
    def source_of(self) -> Sequence[int]:
        """Number of each row's source, an int32 array `[rows]`."""
        return cast(Sequence[int], self._numbers("sources"))

    @cached_property
    def lines(self) -> NDArray[np.int64]:
        """Line of each row in its source."""
        return self._numbers("lines")

    @cached_property
    def copies(self) -> NDArray[np.int32]:
        """Which changed copy of its row each is, from 1; 0: the row as it is."""
        return self._numbers("copies")

    @cached_property
    def hashes(self) -> NDArray[np.uint64]:
        """64 bits of a hash of what each row asks and answers; equal rows have equal ones."""
        return self._numbers("hashes")

    @cached_property
    def prompt_hashes(self) -> NDArray[np.uint64]:
        """64 bits of a hash of what each row asks; `NO_PROMPT` where it asks nothing."""
        return self._numbers("prompt_hashes")

    def read_column(self, name: str) -> Iterator[NDArray[Any]]:
        """All values of a column, some rows at a time: `[rows, width]`, or `[values]` joined where it has no width."""
        width = next(column.width for column in self.columns if column.name == name)
        starts, ends = self._places[name]
        gaps = np.flatnonzero(starts[1:] != ends[:-1]) + 1  # rows of a set need not lie side by side
        blocks = np.arange(0, len(starts), _READ_ROWS)
        for rows in np.split(np.arange(len(starts)), np.union1d(gaps, blocks[1:])):
            if len(rows):
                values = self._values[name].read(int(starts[rows[0]]), int(ends[rows[-1]]))
                yield values if width is None else values.reshape(-1, width)

    def longest(self, name: str) -> int:
        """Values of the row that has most in a column."""
        starts, ends = self._places[name]
        return int(np.max(ends - starts, initial=0))

    def select(self, rows: NDArray[np.int64]) -> ExampleSet:
        """The same store with some of the rows of this set, in their old order."""
        kept = np.sort(rows)
        more = {name: values[kept] for name, values in self._more.items()}
        return ExampleSet(self.folder, self.columns, self.files, self.repeats, self._rows[kept], more)

    def with_columns(self, more: Mapping[str, NDArray[Any]]) -> ExampleSet:
        """The same rows with further columns, `[rows, width]`; they are no part of the digest."""
        more = {**self._more, **more}
        return ExampleSet(self.folder, self.columns, self.files, self.repeats, self._rows, more)

    def first(self, count: int) -> ExampleSet:
        """Its first rows."""
        return self.select(np.arange(min(count, len(self)), dtype=np.int64))

    def digest(self) -> str:
        """SHA-256 of all values of all rows, in order: neither paths nor line ends matter."""
        digest = hashlib.sha256(np.asarray(self.lengths, dtype="<i8").tobytes())
        for name in (column.name for column in self.columns if not column.says_where):
            starts, ends = self._places[name]
            gaps = np.flatnonzero(starts[1:] != ends[:-1]) + 1
            firsts, lasts = np.append(0, gaps), np.append(gaps, len(self)) - 1
            for start, end in zip(starts[firsts].tolist(), ends[lasts].tolist(), strict=True):
                for piece in self._values[name].pieces(start, end):
                    digest.update(piece)
        return digest.hexdigest()
