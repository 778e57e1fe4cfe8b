"""Rows of a .json file, which is held whole while they are read.

[{...}, {...}]                   an array of objects
{"version": 1, "data": [{...}]}  one object that wraps such an array under its only list of objects
{...}                            one row
{...}⏎{...}                      an object a line: read as jsonl
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
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
        is_row: Whether an object looks like a row of a known format.

    Raises:
        DataError: It is no UTF-8, too large, malformed, or it is not clear where its rows are.
    """
    whole = _read_text(path)
    text = _Text(whole)
    first, begin = text.peek(), text.place
    if first == "{":
        try:
            values = dict(_read_object(text))
            is_lines = bool(text.peek())
        except DataError:
            first_line = whole[begin:].partition("\n")[0]
            is_lines = first_line.rstrip().endswith("}")  # an object a line, the first of them malformed
            if not is_lines:
                raise
        if is_lines:
            yield from read_jsonl(path)
            return
        lists = [key for key, place in values.items() if place is not None]
        is_only_row = not lists or is_row(dict.fromkeys(values))
        if len(lists) > 1 and not is_only_row:
            raise DataError(f"holds several lists of objects: {listed(lists)}", todo="write the one you want as a file")
        text = _Text(whole, begin if is_only_row else values[lists[0]] or 0)
        yield from [(text.line(), as_row(text.value()))] if is_only_row else _read_array(text)
    elif first == "[":
        yield from _read_array(text)
        if text.peek():
            raise text.error(JsonError("invalid JSON: extra data behind the array", text.place))
    elif first:
        raise DataError("invalid JSON: expected an array of objects", line=text.line())


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


def _read_object(text: _Text) -> Iterator[tuple[str, int | None]]:
    """The keys of the object here, each with the place of its value where that is a list of objects."""
    keys: set[str] = set()
    for _ in text.items("{}"):
        if text.peek() != '"':
            raise text.error(JsonError("invalid JSON: expecting property name enclosed in double quotes", text.place))
        key = _take(text)
        text.expect(":")
        if key in keys:
            raise text.error(JsonError(f"duplicate key '{key}'", text.place))
        keys.add(key)
        place, is_list = text.place, text.peek() == "["
        kinds = [isinstance(row, dict) for _, row in _read_array(text)] if is_list else [_take(text) is None]
        yield key, place if is_list and kinds[:1] == [True] else None


def _take(text: _Text) -> Any:
    """The value here; raises the error for one that the strict parser refuses."""
    line, value = text.line(), text.value()
    if isinstance(value, DataError):
        raise value.at(line=line)
    return value


def _read_array(text: _Text) -> RawRows:
    for _ in text.items("[]"):
        yield text.line(), as_row(text.value())


class _Text:
    """The text of a JSON file.

    Attributes:
        place: Where the next value, or what stands between two of them, begins.
    """

    def __init__(self, text: str, place: int = 0) -> None:
        self._text, self.place = text, place
        self._line, self._counted = 1, 0  # the line that character `_counted` is on

    def peek(self) -> str:
        """The next character that is no blank, which becomes the place; empty at the end."""
        found = _BLANK.match(self._text, self.place)
        self.place = found.end() if found else self.place
        return self._text[self.place : self.place + 1]

    def expect(self, characters: str) -> str:
        """Goes behind one of some characters, and gives it. Raises DataError where another is next."""
        if not self.peek() or self.peek() not in characters:
            raise self.error(JsonError(f"invalid JSON: expected {characters[0]}", self.place))
        self.place += 1
        return self._text[self.place - 1]

    def items(self, brackets: str) -> Iterator[None]:
        """Stops at each item of the array or object here, which is to be read before the next."""
        self.expect(brackets[0])
        is_over = self.peek() == brackets[1]
        self.place += is_over
        while not is_over:
            self.peek()
            yield
            is_over = self.expect("," + brackets[1]) != ","

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
