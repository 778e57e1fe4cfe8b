"""Files of lines: what holds an object a line, a prompt a line, or one text.

A reader yields `(line, row)`; a row that cannot be used comes as the DataError that says why, and reading goes on. What
makes the rest of a file unreadable is raised, with its line. Lines end at `\\n` alone: a form feed, NEL or U+2028 is
part of a text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorafit.contracts import JsonObject
from lorafit.data.sources.files import BOM, LINE_LIMIT_BYTES, READ_BYTES, open_file, utf8_hint
from lorafit.errors import DataError
from lorafit.files.strict_json import JsonError, parse_json
from lorafit.kinds.fields import describe

RawRow = JsonObject
RawRows = Iterator[tuple[int, RawRow | DataError]]

BLANKS = " \t\r\n"
"""What JSON passes over between values."""
TEXT_STRETCH_CHARACTERS = 1 << 20


def read_lines(path: Path) -> Iterator[tuple[int, str | DataError]]:
    """Every line with its number, its end kept; a line that cannot be used comes as the error that says why.

    At most `LINE_LIMIT_BYTES` are held at a time. Lines end at `\\n` alone; a byte order mark is left out.

    Raises:
        DataError: It cannot be unpacked any further.
    """
    with open_file(path) as file:
        number = 0
        try:
            while raw := file.readline(LINE_LIMIT_BYTES + 2):
                number += 1
                if number == 1:
                    raw = raw.removeprefix(BOM)
                if len(raw.rstrip(b"\r\n")) > LINE_LIMIT_BYTES:
                    while raw and not raw.endswith(b"\n"):
                        raw = file.readline(READ_BYTES)
                    yield number, too_long()
                else:
                    yield number, _decode(raw)
        except DataError as error:
            raise error.at(line=number + 1) from None


def too_long() -> DataError:
    """The error for a row of more than `LINE_LIMIT_BYTES`."""
    limit = f"{LINE_LIMIT_BYTES >> 20} MiB"
    return DataError(f"longer than {limit}, the limit of a row", todo="cut it into several rows")


def _decode(raw: bytes) -> str | DataError:
    if b"\0" in raw:
        place = raw.index(b"\0") + 1
        return DataError(f"NUL byte at column {place}: a torn write, or not a text file", todo="write the file again")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"not valid UTF-8: byte 0x{raw[error.start]:02X} at column {error.start + 1}"
        return DataError(what, todo=utf8_hint(raw[error.start]))


def read_jsonl(path: Path) -> RawRows:
    """One object a line; blank lines are passed over."""
    for number, line in read_lines(path):
        if isinstance(line, DataError):
            yield number, line
            continue
        text = line.strip(BLANKS)
        if not text:
            continue
        try:
            if number == 1 and (text == "[" or text.startswith("[{")):
                raise DataError("is a JSON array, not an object a line", line=1, todo="name the file .json")
            yield number, as_row(parse_json(text))
        except JsonError as error:
            torn = "invalid JSON" if line.endswith("\n") else "truncated or invalid JSON"
            column = None if error.position is None else error.position + 1
            yield number, DataError(error.what.replace("invalid JSON", torn), line=number, column=column)


def as_row(value: Any) -> RawRow | DataError:
    """The value, if it is an object; an error stays one."""
    if isinstance(value, dict | DataError):
        return value
    return DataError(f"expected an object, found {describe(value)}")


def first_object(path: Path) -> RawRow | None:
    """The object that a file's first line holds, blank lines apart; None where that line is something else."""
    for _, line in read_lines(path):
        text = line.strip(BLANKS) if isinstance(line, str) else "?"
        if text:
            try:
                value = parse_json(text) if text.startswith("{") else None
            except JsonError:
                return None
            return value if isinstance(value, dict) else None
    return None


def read_txt(path: Path) -> RawRows:
    """The whole file as one text; a file of more than a Mi characters as several, cut behind a paragraph.

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
