"""Rows of a .json file, which is held whole while they are read.

[{...}, {...}]                   an array of objects
{"version": 1, "data": [{...}]}  one object that wraps such an array under its only list of objects
{...}                            one row
{...}⏎{...}                      an object a line: read as jsonl
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafit.data.sources.files import LINE_LIMIT_BYTES, open_file, utf8_hint
from lorafit.data.sources.lines import BLANKS, RawRow, RawRows, as_row, read_jsonl, too_long
from lorafit.errors import DataError
from lorafit.files.strict_json import JsonError, check_depth, decode_at
from lorafit.kinds.fields import listed

FILE_LIMIT_BYTES = 512 << 20
_BLANK = re.compile(f"[{BLANKS}]*")


def read_json_file(path: Path, is_row: Callable[[RawRow], bool]) -> RawRows:
    """The rows of a .json file, with the lines that they begin on.

    Args:
        path: The file.
        is_row: Whether an object looks like a row of a known format.

    Raises:
        DataError: It is no UTF-8, too large, malformed, or it is not clear where its rows are.
    """
    text = _Text(_read_text(path))
    first = text.peek()
    if first == "[":
        yield from _read_array(text)
        if text.peek():
            raise text.error(JsonError("invalid JSON: extra data behind the array", text.place))
        return
    if first and first != "{":
        raise DataError("invalid JSON: expected an array of objects", line=text.line())
    begin = text.place
    outline = _read_outline(text) if first else {}
    if outline is None:
        yield from read_jsonl(path)
        return
    lists = [key for key, place in outline.items() if place]
    is_only_row = not lists or is_row(dict.fromkeys(outline))
    if len(lists) > 1 and not is_only_row:
        raise DataError(f"holds several lists of objects: {listed(lists)}", todo="write the one you want as a file")
    text.go_to(begin if is_only_row else outline[lists[0]])
    if not is_only_row:
        yield from _read_array(text)
    elif text.peek():
        yield text.line(), as_row(text.value())


def _read_text(path: Path) -> str:
    """A file of UTF-8, unpacked.

    Raises:
        DataError: It is none, or holds more than `FILE_LIMIT_BYTES`.
    """
    with open_file(path) as file:
        raw = file.read(FILE_LIMIT_BYTES + 1)
    if len(raw) > FILE_LIMIT_BYTES:
        what = f"larger than {FILE_LIMIT_BYTES >> 20} MiB, and a .json file is read whole"
        raise DataError(what, todo="write it as jsonl: an object a line")
    if b"\0" in raw:
        line = 1 + raw.count(b"\n", 0, raw.index(b"\0"))
        raise DataError("NUL byte: a torn write", line=line, todo="write it again")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = 1 + raw.count(b"\n", 0, error.start), raw[error.start]
        raise DataError(f"not valid UTF-8: byte 0x{byte:02X}", line=line, todo=utf8_hint(byte)) from None


def _read_outline(text: _Text) -> dict[str, int] | None:
    """The keys of the object here, each with the place of its list of objects, 0 where it holds none; None where an
    object a line stands.
    """
    begin, outline = text.place, dict[str, int]()
    try:
        text.expect("{")
        while not text.take("}"):
            if outline:
                text.expect(",")
            key = _read_key(text)
            if key in outline:
                raise text.error(JsonError(f"duplicate key '{key}'", text.place))
            place = text.place if text.peek() == "[" else 0
            outline[key] = place if _skip(text) else 0
    except DataError:
        if text.line_from(begin).endswith("}"):  # an object a line, the first of them malformed
            return None
        raise
    return None if text.peek() else outline


def _read_key(text: _Text) -> str:
    if text.peek() != '"':
        raise text.error(JsonError("invalid JSON: expecting property name enclosed in double quotes", text.place))
    key = text.value()
    text.expect(":")
    if isinstance(key, DataError):
        raise key
    return str(key)


def _skip(text: _Text) -> bool:
    """Goes behind the value here; whether it is a list whose first entry is an object."""
    if text.peek() != "[":
        value = text.value()
        if isinstance(value, DataError):
            raise value.at(line=text.line())
        return False
    kinds = [isinstance(row, dict) for _, row in _read_array(text)]
    return bool(kinds) and kinds[0]


def _read_array(text: _Text) -> RawRows:
    text.expect("[")
    is_over = text.take("]")
    while not is_over:
        text.peek()
        line = text.line()
        yield line, as_row(text.value())
        is_over = text.take("]")
        if not is_over:
            text.expect(",")


class _Text:
    """The text of a JSON file.

    Attributes:
        place: Where the next value, or what stands between two of them, begins.
    """

    def __init__(self, text: str) -> None:
        self._text, self.place = text, 0
        self._line, self._counted = 1, 0  # the line that character `_counted` is on

    def go_to(self, place: int) -> None:
        """To a place that was seen before."""
        self.place, self._line, self._counted = place, 1, 0

    def peek(self) -> str:
        """The next character that is no blank, which becomes the place; empty at the end."""
        found = _BLANK.match(self._text, self.place)
        self.place = found.end() if found else self.place
        return self._text[self.place : self.place + 1]

    def take(self, character: str) -> bool:
        """Goes behind a character if it is the next."""
        is_next = self.peek() == character
        self.place += is_next
        return is_next

    def expect(self, character: str) -> None:
        """Goes behind a character. Raises DataError where another is next."""
        if not self.take(character):
            raise self.error(JsonError(f"invalid JSON: expected {character}", self.place))

    def value(self) -> Any:
        """The value here, behind which the place moves; or the error for one that the strict parser alone refuses.

        Raises:
            DataError: It is malformed, so that its end is not known.
        """
        self.peek()
        start, value = self.place, None
        try:
            value, end = decode_at(self._text, start)
            check_depth(self._text[start:end])
        except JsonError as error:
            value = DataError(error.what)
            try:
                end = json.JSONDecoder().raw_decode(self._text, start)[1]
            except (ValueError, RecursionError):
                raise self.error(error) from None
        if end - start > LINE_LIMIT_BYTES // 4:  # a character has 4 bytes at most
            value = too_long() if len(self._text[start:end].encode()) > LINE_LIMIT_BYTES else value
        self.place = end
        return value

    def line_from(self, place: int) -> str:
        """The rest of the line from a place on, without blanks at its end."""
        end = self._text.find("\n", place)
        return self._text[place : end if end >= 0 else len(self._text)].rstrip()

    def line(self) -> int:
        """The line that the place is on."""
        self._line += self._text.count("\n", self._counted, self.place)
        self._counted = self.place
        return self._line

    def error(self, error: JsonError) -> DataError:
        """A fault of the text, with its line and column."""
        position = self.place if error.position is None else error.position
        end = len(self._text.rstrip(BLANKS))
        is_torn = position >= end or "unterminated string" in error.what
        what = error.what.replace("invalid JSON", "truncated or invalid JSON") if is_torn else error.what
        if position >= end:  # said of the last line that holds something
            return DataError(what, line=1 + self._text.count("\n", 0, end))
        column = position - self._text.rfind("\n", 0, position)
        return DataError(what, line=1 + self._text.count("\n", 0, position), column=column)
