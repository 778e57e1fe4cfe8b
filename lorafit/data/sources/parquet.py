"""Rows of parquet files, a few at a time: as many as surely fit into memory, by what the file says of its columns.

A value stands in the file once where it stands in a dictionary page, and in each row once it is read: eight rows that
share a text of 50 MB are two kilobytes on disk. So a batch is bounded by the dictionary's size for each of its values.
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
_PAGE_HEADER_BYTES = 32


def read_parquet(path: Path) -> RawRows:
    """Rows of a parquet file by their number; nulls inside lists and structs, which Arrow adds, are left out.

    Raises:
        DataError: It is no parquet file, is damaged, or unpacks to a bomb.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES) as file:
            for group in range(file.metadata.num_row_groups):
                rows = _count_batch_rows(path, file.metadata.row_group(group))
                for batch in file.iter_batches(batch_size=rows, row_groups=[group]):
                    for row in _rows_of(batch):
                        number += 1
                        yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())[:120]
        raise DataError(f"cannot be read as parquet: {what}", line=number + 1 if number else None) from None


def _rows_of(batch: Any) -> Iterator[RawRow | DataError]:
    """The rows of a batch; those larger than a row may be as the error that says so, before they become objects."""
    import pyarrow

    columns = [column.dictionary_decode() if hasattr(column, "dictionary") else column for column in batch.columns]
    batch = pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)
    parts = [batch] if batch.nbytes <= LINE_LIMIT_BYTES else [batch.slice(row, 1) for row in range(batch.num_rows)]
    for part in parts:
        if part.nbytes > LINE_LIMIT_BYTES:
            yield too_long()
            continue
        for row in part.to_pylist():
            yield {name: without_nulls(value) for name, value in row.items()}


def _count_batch_rows(path: Path, group: Any) -> int:
    """Rows of a row group that take `BATCH_BYTES` at most once they are read, 1 to 256.

    Raises:
        DataError: A column unpacks to a bomb.
    """
    columns = [group.column(number) for number in range(group.num_columns)]
    row_bytes = group.total_byte_size / max(1, group.num_rows)
    for column in columns:
        if is_bomb(column.total_uncompressed_size, column.total_compressed_size):
            sizes = f"{column.total_compressed_size:,} bytes to {column.total_uncompressed_size:,}"
            what = f"column {column.path_in_schema} unpacks from {sizes}"
            raise DataError(what, todo="write it with a dictionary if that is right")
        row_bytes += _dictionary_bytes(path, column) * max(1, column.num_values / max(1, group.num_rows))
    return int(min(_BATCH_ROWS, max(1, BATCH_BYTES // max(1, row_bytes))))


def _dictionary_bytes(path: Path, column: Any) -> int:
    """Size of a column's dictionary page once it is unpacked, which no value of it exceeds; 0 without one.

    The page's header says so, in Thrift's compact form: field 1, the type, and field 2, the size, both zigzag varints.
    """
    if not column.has_dictionary_page:
        return 0
    with path.open("rb") as file:
        file.seek(column.dictionary_page_offset)
        header = file.read(_PAGE_HEADER_BYTES)
    try:
        place = 0
        for _ in range(2):
            if header[place] != 0x15:  # the next field, a 32-bit integer
                raise IndexError
            value, place = _read_varint(header, place + 1)
        return value >> 1
    except IndexError:  # no such header: what it is part of is larger
        return int(column.total_uncompressed_size)


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value, shift, place = value | (byte & 0x7F) << shift, shift + 7, place + 1
        if byte < 0x80:
            return value, place


def without_nulls(value: Any) -> Any:
    """The value without null entries of objects inside it; Arrow gives every object of a list the keys of all."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
