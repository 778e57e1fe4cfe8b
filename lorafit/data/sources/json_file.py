"""Rows of a .json file, of which only a stretch is held at a time.

[{...}, {...}]                   an array of objects
{"version": 1, "data": [{...}]}  one object that wraps such an array under its only list of objects
{...}                            one row
{...}⏎{...}                      an object a line: read as jsonl
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from lorafit.data.sources.files import LINE_LIMIT_BYTES, READ_BYTES, open_file, utf8_hint
from lorafit.data.sources.lines import BLANKS, RawRow, RawRows, as_row, read_jsonl, too_long
from lorafit.errors import DataError
from lorafit.files.strict_json import JsonError, check_depth, decode_at
from lorafit.kinds.fields import listed

_BLANK = re.compile(f"[{BLANKS}]*")
_CUT_CHARACTERS = 16  # a value that the held stretch cuts may fail this far before the cut: `tru`, `\u00e`


def read_json_file(path: Path, is_row: Callable[[RawRow], bool]) -> RawRows:
    """The rows of a .json file, with the lines that they begin on.

    Args:
        path: The file.
        is_row: Whether an object looks like a row of a known format.

    Raises:
        DataError: It is no UTF-8, malformed, or it is not clear where its rows are.
    """
    with open_file(path) as file:
        text = _Text(file)
        first = text.peek()
        if first == "[":
            yield from _read_array(text)
            if text.peek():
                raise text.error(JsonError("invalid JSON: extra data behind the array", text.place))
            return
        if first and first != "{":
            raise DataError("invalid JSON: expected an array of objects", line=text.line())
        outline = _read_outline(text) if first else {}
    if outline is None:
        yield from read_jsonl(path)
        return
    lists = [key for key, holds_objects in outline.items() if holds_objects]
    is_only_row = not lists or is_row(dict.fromkeys(outline))
    if len(lists) > 1 and not is_only_row:
        raise DataError(f"holds several lists of objects: {listed(lists)}", todo="write the one you want as a file")
    with open_file(path) as file:
        text = _Text(file)
        if not is_only_row:
            _go_to(text, lists[0])
            yield from _read_array(text)
        elif text.peek():
            yield text.line(), as_row(text.value())


def _read_outline(text: _Text) -> dict[str, bool] | None:
    """The keys of the object here, and whether each holds a list of objects; None where an object a line stands."""
    first_line = text.rest_of_line()
    try:
        outline = _walk_object(text)
    except DataError:
        if first_line.endswith("}"):  # an object a line, the first of them malformed
            return None
        raise
    return None if text.peek() else outline


def _walk_object(text: _Text) -> dict[str, bool]:
    outline: dict[str, bool] = {}
    text.expect("{")
    while not text.take("}"):
        if outline:
            text.expect(",")
        key = _read_key(text)
        if key in outline:
            raise text.error(JsonError(f"duplicate key '{key}'", text.place))
        outline[key] = _skip(text)
    return outline


def _read_key(text: _Text) -> str:
    if text.peek() != '"':
        raise text.error(JsonError("invalid JSON: expecting property name enclosed in double quotes", text.place))
    key = text.value()
    text.expect(":")
    if isinstance(key, DataError):
        raise key
    return str(key)


def _go_to(text: _Text, wanted: str) -> None:
    """To the value under a key of the (valid) object here."""
    text.expect("{")
    while _read_key(text) != wanted:
        _skip(text)
        text.expect(",")


def _skip(text: _Text) -> bool:
    """Goes behind the value here; whether it is a list whose first entry is an object."""
    if text.peek() != "[":
        value = text.value()
        if isinstance(value, DataError):
            raise value.at(line=text.line())
        return False
    first: object = None
    for number, (_, row) in enumerate(_read_array(text)):
        first = row if number == 0 else first
    return isinstance(first, dict)


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
    """The text of a JSON file from one place on: at least as much of it as a row may have, and not much more.

    Attributes:
        place: Where the next value, or what stands between two of them, begins in what is held.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8-sig")()
        self._held, self._ended, self.place = "", False, 0
        self._dropped = 0  # characters before what is held
        self._line, self._line_start, self._counted = 1, 0, 0  # the line that character `_counted` of it is on
        self._lines_read = 0

    def peek(self) -> str:
        """The next character that is no blank, which becomes the place; empty at the end."""
        while True:
            self._fill()
            found = _BLANK.match(self._held, self.place)
            assert found is not None, "no blanks match too"
            self.place = found.end()
            if self.place < len(self._held) or self._ended:
                return self._held[self.place : self.place + 1]

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
            DataError: It is malformed, so that its end is not known, or longer than a row may be.
        """
        self.peek()
        start = self.place
        value: Any
        try:
            value, end = decode_at(self._held, start)
            check_depth(self._held[start:end])
        except JsonError as error:
            value, end = DataError(error.what), self._end_of_value(start, error)
        if end - start > LINE_LIMIT_BYTES // 4:  # a character has 4 bytes at most
            value = too_long() if len(self._held[start:end].encode()) > LINE_LIMIT_BYTES else value
        self.place = end
        return value

    def _end_of_value(self, start: int, error: JsonError) -> int:
        """Where a value ends that the strict parser refused and the standard one reads."""
        try:
            return json.JSONDecoder().raw_decode(self._held, start)[1]
        except (ValueError, RecursionError) as failed:
            position = getattr(failed, "pos", 0)
            is_cut = position >= len(self._held) - _CUT_CHARACTERS or "Unterminated string" in str(failed)
            if is_cut and not self._ended:
                raise too_long().at(line=self.line()) from None
            raise self.error(error) from None

    def rest_of_line(self) -> str:
        """What is held of the line from the place on, without blanks at its end."""
        end = self._held.find("\n", self.place)
        return self._held[self.place : end if end >= 0 else len(self._held)].rstrip()

    def line(self) -> int:
        """The line that the place is on."""
        self._line, column = self._locate(self.place)
        self._line_start, self._counted = self._dropped + self.place - column + 1, self.place
        return self._line

    def _locate(self, position: int) -> tuple[int, int]:
        """Line and column of a character that is held, not before the one that was asked for last."""
        newline = self._held.rfind("\n", self._counted, position)
        start = self._dropped + newline + 1 if newline >= 0 else self._line_start
        lines = self._held.count("\n", self._counted, position)
        return self._line + lines, self._dropped + position - start + 1

    def error(self, error: JsonError) -> DataError:
        """A fault of the text, with its line and column."""
        position = self.place if error.position is None else error.position
        line, column = self._locate(position)
        end = len(self._held.rstrip(BLANKS)) if self._ended else position + 1
        is_torn = position >= end or "unterminated string" in error.what
        what = error.what.replace("invalid JSON", "truncated or invalid JSON") if is_torn else error.what
        if position >= end:  # said of the last line that holds something
            return DataError(what, line=line - self._held.count("\n", end, position))
        return DataError(what, line=line, column=column)

    def _fill(self) -> None:
        """Reads on until a row's longest text is held from the place on, and lets go of what is before it."""
        if self._ended or len(self._held) - self.place >= LINE_LIMIT_BYTES:
            return
        self.line()
        pieces, size = [self._held[self.place :]], len(self._held) - self.place
        self._dropped, self._counted, self.place = self._dropped + self.place, 0, 0
        while size < 2 * LINE_LIMIT_BYTES and not self._ended:
            pieces.append(self._read())
            size += len(pieces[-1])
        self._held = "".join(pieces)

    def _read(self) -> str:
        line = self._lines_read + 1
        try:
            raw = self._file.read(READ_BYTES)
            self._ended = not raw
            self._lines_read += raw.count(b"\n")
            if b"\0" in raw:
                line += raw.count(b"\n", 0, raw.index(b"\0"))
                raise DataError("NUL byte: a torn write", todo="write it again")
            return self._decoder.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            byte = error.object[error.start]
            raise DataError(f"not valid UTF-8: byte 0x{byte:02X}", line=line, todo=utf8_hint(byte)) from None
        except DataError as error:
            raise error.at(line=line) from None
