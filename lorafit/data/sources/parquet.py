"""Rows of parquet files, a few at a time: as many as surely fit into memory, by what the file says of its columns.

A value stands in the file once where it stands in a dictionary page: eight rows that share a text of 50 MB are two
kilobytes on disk. So dictionaries stay what they are, and each row gets its values when it is its turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorafit.data.sources.files import LINE_LIMIT_BYTES, is_bomb
from lorafit.data.sources.lines import RawRow, RawRows, too_long
from lorafit.errors import DataError

BATCH_BYTES = 64 << 20
_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20
_TOGETHER_BYTES = 1 << 28


def read_parquet(path: Path) -> RawRows:
    """Rows of a parquet file by their number; nulls inside lists and structs, which Arrow adds, are left out.

    Raises:
        DataError: It is no parquet file, is damaged, or unpacks to a bomb.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [file.schema.column(number).path for number in range(len(file.schema))]
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, read_dictionary=columns) as file:
            for group in range(file.metadata.num_row_groups):
                rows = _count_batch_rows(file.metadata.row_group(group))
                for batch in file.iter_batches(batch_size=rows, row_groups=[group]):
                    for row in _rows_of(batch):
                        number += 1
                        yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())[:120]
        raise DataError(f"cannot be read as parquet: {what}", line=number + 1 if number else None) from None


def _rows_of(batch: Any) -> Iterator[RawRow | DataError]:
    """The rows of a batch; those larger than a row may be as the error that says so."""
    together = batch.nbytes * batch.num_rows <= _TOGETHER_BYTES  # none is larger than what all of them share
    parts = [batch] if together else (batch.slice(row, 1) for row in range(batch.num_rows))
    for row in (row for part in parts for row in part.to_pylist()):
        is_large = not together and _count_bytes(row) > LINE_LIMIT_BYTES
        yield too_long() if is_large else {name: without_nulls(value) for name, value in row.items()}


def _count_bytes(value: Any) -> int:
    """Bytes of the texts in a value."""
    if isinstance(value, dict):
        return sum(map(_count_bytes, value.values()))
    if isinstance(value, list):
        return sum(map(_count_bytes, value))
    return len(value.encode() if isinstance(value, str) else value) if isinstance(value, (str, bytes)) else 8


def _count_batch_rows(group: Any) -> int:
    """Rows of a row group that take about `BATCH_BYTES` once they are read, 1 to 256.

    Raises:
        DataError: A column unpacks to a bomb.
    """
    for column in (group.column(number) for number in range(group.num_columns)):
        if is_bomb(column.total_uncompressed_size, column.total_compressed_size):
            sizes = f"{column.total_compressed_size:,} bytes to {column.total_uncompressed_size:,}"
            what = f"column {column.path_in_schema} unpacks from {sizes}"
            raise DataError(what, todo="write it with a dictionary if that is right")
    row_bytes = group.total_byte_size // max(1, group.num_rows)
    return int(min(_BATCH_ROWS, max(1, BATCH_BYTES // max(1, row_bytes))))


def without_nulls(value: Any) -> Any:
    """The value without null entries of objects inside it; Arrow gives every object of a list the keys of all."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
