"""Rows of csv and tsv files. The first line is the header, unless the mapped columns are numbers (from 1).

The separator of a csv file is the one of `,` `;` tab and `|` under which its columns make sense: they are those that
the recipe maps, or those of a known format, or every row has as many. Fields stay the text that they are: `12,50` too.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lorafit.data.sources.files import LINE_LIMIT_BYTES
from lorafit.data.sources.lines import RawRow, RawRows, read_lines
from lorafit.errors import DataError

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_RECORDS_LOOKED_AT = 20
_SAYS_SEPARATOR = re.compile(r'"?sep=([,;|\t])"?\r?\n?')  # the first line of some files for Excel

Records = Iterator[tuple[int, list[str] | DataError]]


def read_csv(path: Path, columns: Sequence[str], is_row: Callable[[RawRow], bool]) -> RawRows:
    """Rows of a csv file.

    Args:
        columns: Source columns that the recipe maps.
        is_row: Whether an object has the columns of a known format.

    Raises:
        DataError: It is not clear what separates the fields, or the header or the quotes are at fault.
    """
    separator = find_separator(path, columns, is_row)
    hint = f"a {SEPARATORS[separator]} inside a field needs quotes around it"
    return name_fields(_read_csv_records(path, separator), columns, hint)


def read_tsv(path: Path, columns: Sequence[str]) -> RawRows:
    """Rows of a tsv file."""
    hint = "a tab or line end inside a field? write it as csv or jsonl"
    return name_fields(_read_tsv_records(path), columns, hint)


def name_fields(records: Records, columns: Sequence[str], hint: str) -> RawRows:
    """Records as rows by the header's names, or by number. Records of nothing but empty fields are passed over.

    Args:
        records: The header, if there is one, and what is below it.
        columns: Source columns that the recipe maps; numbers mean that there is no header.
        hint: What to do where a record has more or fewer fields than the header.

    Raises:
        DataError: The header cannot be read, or names a column twice.
    """
    header: list[str] | None = None
    for line, record in records:
        if isinstance(record, DataError):
            if header is None:
                raise record.at(line=line)
            yield line, record
            continue
        if len(record) > 1 and not any(record):
            continue
        if header is None:
            header = [name.strip() for name in record]
            if are_numbers(columns) and not set(columns) <= set(header):
                header = [str(number + 1) for number in range(len(record))]
            else:
                _check_header(header, line)
                continue
        if len(record) != len(header):
            yield line, DataError(f"has {len(record)} fields, the header {len(header)}", todo=hint)
        else:
            yield line, dict(zip(header, record, strict=True))


def are_numbers(columns: Sequence[str]) -> bool:
    """Whether mapped columns are numbers, as in a table without a header."""
    return bool(columns) and all(name.isdecimal() for name in columns)


def _check_header(header: list[str], line: int) -> None:
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if repeated:
        todo = "rename one; a file without a header needs columns by number: {text: '1'}"
        raise DataError(f"the header names '{repeated[0]}' twice", line=line, todo=todo)


@dataclass(frozen=True, slots=True)
class _Reading:
    """The first records of a file under one separator; `is_whole` where its quotes go together with it."""

    separator: str
    header: list[str]
    widths: frozenset[int]
    is_whole: bool


def find_separator(path: Path, columns: Sequence[str], is_row: Callable[[RawRow], bool]) -> str:
    """What separates the fields of a csv file.

    Raises:
        DataError: Several separators make sense.
    """
    first = next((line for _, line in read_lines(path)), "")
    said = _SAYS_SEPARATOR.fullmatch(first) if isinstance(first, str) else None
    if said:
        return said[1]
    readings = [_read_first(path, separator) for separator in SEPARATORS]
    left = [reading for reading in readings if len(reading.header) > 1]
    if not left:  # one column: what is in no field of it separates nothing
        return next((one.separator for one in readings if one.is_whole and one.widths <= {1}), ",")

    def is_mapped(reading: _Reading) -> bool:
        if are_numbers(columns):
            return min(reading.widths) >= max(map(int, columns))
        return bool(columns) and set(columns) <= set(reading.header)

    def is_known(reading: _Reading) -> bool:
        return is_row(dict.fromkeys(reading.header, ""))

    def is_even(reading: _Reading) -> bool:
        return reading.is_whole and len(reading.widths) == 1

    for makes_sense in (is_mapped, is_known, is_even):
        left = [reading for reading in left if makes_sense(reading)] or left
    if len(left) > 1:
        names = " or a ".join(SEPARATORS[reading.separator] for reading in left)
        todo = "map one of its columns by name, e.g. columns: {question: THEIRS}, or save it anew"
        raise DataError(f"the separator looks like a {names}", line=1, todo=todo)
    return left[0].separator


def _read_first(path: Path, separator: str) -> _Reading:
    records: list[list[str]] = []
    is_whole = True
    try:
        for _, record in islice(_read_csv_records(path, separator), _RECORDS_LOOKED_AT):
            if isinstance(record, list):
                records.append(record)
    except DataError:
        is_whole = False
    header = [name.strip() for name in records[0]] if records else []
    return _Reading(separator, header, frozenset(map(len, records)), is_whole)


def _read_csv_records(path: Path, separator: str) -> Records:
    """Records of RFC 4180; a record may run over several lines and is known by its first."""
    csv.field_size_limit(LINE_LIMIT_BYTES)
    found: list[DataError] = []

    def texts() -> Iterator[str]:
        for number, line in read_lines(path):
            if isinstance(line, DataError):
                line.line = number
                found.append(line)
            is_text = isinstance(line, str) and not (number == 1 and _SAYS_SEPARATOR.fullmatch(line))
            yield line if isinstance(line, str) and is_text else ""

    reader = csv.reader(texts(), strict=True, delimiter=separator)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = "a quote that opens in this row never closes" if "end of data" in str(error) else str(error)
            raise DataError(f"invalid CSV: {what}", line=line) from None
        if found:
            yield line, found.pop()
            found.clear()
        elif record:
            yield line, record


def _read_tsv_records(path: Path) -> Records:
    """Lines cut at tabs. Quotes are text, as the format has it, unless a csv writer must have added them.

    A writer that quotes only where it must does so for a field that holds a quote, and doubles those inside: such a
    field is unquoted, while one with a quote at each end and none inside stays. Where the whole header is quoted, every
    field is.
    """
    quotes_all = False
    for number, line in read_lines(path):
        if isinstance(line, DataError):
            yield number, line
            continue
        text = line.rstrip("\r\n")
        if not text:
            continue
        fields = text.split("\t")
        if number == 1:
            quotes_all = all(_is_quoted(field) for field in fields)
        yield number, [_unquote(f) if _is_quoted(f) and (quotes_all or '""' in f[1:-1]) else f for f in fields]


def _is_quoted(field: str) -> bool:
    return len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', "")


def _unquote(field: str) -> str:
    return field[1:-1].replace('""', '"')
