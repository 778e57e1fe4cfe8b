"""Rows of local files, one at a time: jsonl, json, csv, tsv, parquet, txt.

A reader yields `(line, row)`; a row that cannot be used comes as the DataError that says why, and reading goes on. What
makes the rest of the file unreadable is raised, with its line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lorafit.data.files import LINE_LIMIT_BYTES, read_lines
from lorafit.errors import DataError
from lorafit.kinds.fields import describe, listed
from lorafit.strict_json import JsonError, check_depth, decode_at, parse_json

RawRow = dict[str, Any]
RawRows = Iterator[tuple[int, RawRow | DataError]]

JSON_FILE_LIMIT_BYTES = 1 << 30
TEXT_STRETCH_CHARACTERS = 4 << 20
_BLANKS = " \t\r\n"


def read_file(
    path: Path, columns: Sequence[str], is_row: Callable[[RawRow], bool], *, prompts: bool = False
) -> RawRows:
    """The rows of a local file, by its suffix.

    Args:
        path: The file, checked by `check_file`.
        columns: Source columns that the recipe maps; numbers mean that a table has no header.
        is_row: Whether an object looks like a row of a known format (a json file may hold one row, or wrap a list).
        prompts: Whether a line of text is a prompt, rather than the file one text to train on.
    """
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return read_jsonl(path)
    if suffix == ".json":
        return read_json_file(path, is_row)
    if suffix in (".csv", ".tsv"):
        return read_table(path, columns)
    if suffix == ".parquet":
        return read_parquet(path)
    return read_prompt_lines(path) if prompts else read_txt(path)


def read_jsonl(path: Path) -> RawRows:
    """One object a line; blank lines are passed over."""
    for number, line in read_lines(path):
        if isinstance(line, DataError):
            yield number, line
            continue
        text = line.strip(_BLANKS)
        if not text:
            continue
        try:
            yield number, _as_row(parse_json(text))
        except JsonError as error:
            if number == 1 and text == "[":
                raise DataError("is a JSON array, not an object a line", line=1, todo="name the file .json") from None
            torn = "invalid JSON" if line.endswith("\n") else "truncated or invalid JSON"
            column = None if error.position is None else error.position + 1
            yield number, DataError(error.what.replace("invalid JSON", torn), line=number, column=column)


def _as_row(value: Any) -> RawRow | DataError:
    return value if isinstance(value, dict) else DataError(f"expected an object, found {describe(value)}")


def read_json_file(path: Path, is_row: Callable[[RawRow], bool]) -> RawRows:
    """A JSON array of objects, one object that wraps such an array under its only list, or objects a line.

    The text is held in memory, its rows are not.

    Raises:
        DataError: It is larger than 1 GiB, no UTF-8, malformed, or it is not clear where its rows are.
    """
    if path.stat().st_size > JSON_FILE_LIMIT_BYTES:
        todo = "write it as jsonl, which is read line by line"
        raise DataError(f"larger than {JSON_FILE_LIMIT_BYTES >> 30} GiB", todo=todo)
    raw = path.read_bytes()
    if b"\0" in raw:
        raise DataError("NUL byte: a torn write", line=raw.count(b"\n", 0, raw.index(b"\0")) + 1, todo="write it again")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        what = f"not valid UTF-8: byte 0x{raw[error.start]:02X}"
        raise DataError(what, line=line, todo="save the file as UTF-8") from None
    del raw
    start = _skip_blanks(text, 0)
    if text.startswith("[", start):
        yield from _read_array(text, start)
    elif text.startswith("{", start):
        yield from _read_object(path, text, start, is_row)
    elif start < len(text):
        raise DataError("invalid JSON: expected an array of objects", line=_line_of(text, start))


def _read_object(path: Path, text: str, start: int, is_row: Callable[[RawRow], bool]) -> RawRows:
    try:
        value, end = decode_at(text, start)
    except JsonError as error:
        first_line = text[start:].split("\n", 1)[0].rstrip()
        if first_line.endswith("}"):  # an object a line, the first of them malformed
            yield from read_jsonl(path)
            return
        raise _json_error(text, start, error) from None
    if _skip_blanks(text, end) < len(text):
        yield from read_jsonl(path)
        return
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if is_row(value) or not lists:
        yield _line_of(text, start), value
    elif len(lists) > 1:
        raise DataError(f"holds several lists of objects: {listed(lists)}", todo="write the one you want as a file")
    else:
        yield from _read_array(text, _find_list(text, start, lists[0]))


def _find_list(text: str, start: int, wanted: str) -> int:
    """Where the list under key `wanted` of the (valid) object at `start` begins."""
    place = _skip_blanks(text, start + 1)
    while True:
        key, place = decode_at(text, place)
        place = _skip_blanks(text, _skip_blanks(text, place) + 1)  # behind the colon
        if key == wanted:
            return place
        _, place = decode_at(text, place)
        place = _skip_blanks(text, _skip_blanks(text, place) + 1)  # behind the comma


def _read_array(text: str, start: int) -> RawRows:
    place, line, counted = _skip_blanks(text, start + 1), 1, 0
    is_first = True
    while not text.startswith("]", place):
        if not is_first:
            if not text.startswith(",", place):
                raise _json_error(text, place, JsonError("invalid JSON: expected , or ]", place))
            place = _skip_blanks(text, place + 1)
        is_first = False
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, end = decode_at(text, place)
            check_depth(text[place:end])
            row: RawRow | DataError = _as_row(value)
        except JsonError as error:
            end = _end_of_value(text, place, error)
            row = DataError(error.what)
        yield line, row
        place = _skip_blanks(text, end)


def _end_of_value(text: str, start: int, error: JsonError) -> int:
    """Where a value ends that the strict parser refused and the standard one reads."""
    try:
        return json.JSONDecoder().raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        raise _json_error(text, start, error) from None


def _json_error(text: str, start: int, error: JsonError) -> DataError:
    position = start if error.position is None else error.position
    ended = position >= len(text.rstrip(_BLANKS)) or "unterminated string" in error.what
    what = error.what.replace("invalid JSON", "truncated or invalid JSON") if ended else error.what
    column = position - text.rfind("\n", 0, position)
    return DataError(what, line=_line_of(text, min(position, len(text.rstrip(_BLANKS)))), column=column)


def _skip_blanks(text: str, place: int) -> int:
    while place < len(text) and text[place] in _BLANKS:
        place += 1
    return place


def _line_of(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def read_table(path: Path, columns: Sequence[str]) -> RawRows:
    """Rows of a csv or tsv file. The first line is the header, unless the mapped columns are numbers (from 1)."""
    records = _read_csv_records(path) if path.suffix.lower() == ".csv" else _read_tsv_records(path)
    header: list[str] | None = None
    for line, record in records:
        if isinstance(record, DataError):
            if header is None:
                raise record.at(line=line)
            yield line, record
            continue
        if header is None:
            header = [name.strip() for name in record]
            if columns and all(name.isdecimal() for name in columns) and not set(columns) <= set(header):
                header = [str(number + 1) for number in range(len(record))]
            else:
                _check_header(header, line)
                continue
        if len(record) != len(header):
            yield line, DataError(f"has {len(record)} fields, the header {len(header)}", todo=_quoting_hint(path))
        else:
            yield line, dict(zip(header, record, strict=True))


def _quoting_hint(path: Path) -> str:
    if path.suffix.lower() == ".tsv":
        return "a tab or line end inside a field? write it as csv or jsonl"
    return "a comma inside a field needs quotes around it"


def _check_header(header: list[str], line: int) -> None:
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if repeated:
        todo = "rename one; a file without a header needs columns by number: {text: '1'}"
        raise DataError(f"the header names '{repeated[0]}' twice", line=line, todo=todo)


def _read_csv_records(path: Path) -> Iterator[tuple[int, list[str] | DataError]]:
    """Records of RFC 4180; a record may run over several lines and is known by its first."""
    csv.field_size_limit(LINE_LIMIT_BYTES)
    found: list[DataError] = []

    def texts() -> Iterator[str]:
        for number, line in read_lines(path):
            if isinstance(line, DataError):
                line.line = number
                found.append(line)
            yield "" if isinstance(line, DataError) else line

    reader = csv.reader(texts(), strict=True)
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


def _read_tsv_records(path: Path) -> Iterator[tuple[int, list[str] | DataError]]:
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


def read_parquet(path: Path) -> RawRows:
    """Rows of a parquet file by their number; nulls inside lists and structs, which Arrow adds, are left out.

    Raises:
        DataError: It is no parquet file, or is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {key: without_nulls(value) for key, value in row.items()}
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())[:120]
        raise DataError(f"cannot be read as parquet: {what}", line=number + 1 if number else None) from None


def without_nulls(value: Any) -> Any:
    """The value without null entries of objects inside it; Arrow gives every object of a list the keys of all."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def read_txt(path: Path) -> RawRows:
    """The whole file as one text; a file of more than 4 Mi characters as several, cut behind a paragraph.

    Line ends become `\\n`, and one at the end of a text is left out.
    """
    lines: list[str] = []
    first, size = 1, 0
    for number, line in read_lines(path):
        if isinstance(line, DataError):
            raise line.at(line=number)
        text = line[:-2] + "\n" if line.endswith("\r\n") else line
        lines.append(text)
        size += len(text)
        if size >= 2 * TEXT_STRETCH_CHARACTERS or (size >= TEXT_STRETCH_CHARACTERS and not text.strip()):
            yield first, {"text": "".join(lines).removesuffix("\n")}
            lines, first, size = [], number + 1, 0
    if "".join(lines).strip():
        yield first, {"text": "".join(lines).removesuffix("\n")}


def read_prompt_lines(path: Path) -> RawRows:
    """Every line that is not blank as `{"prompt": line}`."""
    for number, line in read_lines(path):
        if isinstance(line, DataError):
            yield number, line
        elif line.strip():
            yield number, {"prompt": line.removesuffix("\n").removesuffix("\r")}
