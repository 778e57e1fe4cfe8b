"""JSON without the leniencies of the standard parser: what two readers could read differently is an error.

Every JSON file that lorafit opens goes through `read_json_file`: never a pipe or a device, never without end, never so
deep that a reader of what was read would run out of stack.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

from lorafit.contracts import JsonObject

FILE_LIMIT_BYTES = 256 << 20  # hashes of every tensor of a model of 400 billion parameters take a quarter of it
DEPTH_LIMIT = 100  # a chat with tools is about 12 deep; Python's own parser dies near 1000
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BRACKET = re.compile(r"[\[{\]}]")


class JsonError(ValueError):
    """Why a text is not JSON that can be relied on; `position` is an offset into it, or None where it is not known."""

    def __init__(self, what: str, position: int | None = None) -> None:
        super().__init__(what)
        self.what, self.position = what, position


def _unique_keys(pairs: list[tuple[str, Any]]) -> JsonObject:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise JsonError(f"duplicate key '{key}'")
            seen.add(key)
    return row


def _no_constant(name: str) -> NoReturn:
    raise JsonError(f"invalid JSON: {name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise JsonError(f"number {text[:20]} is too large: it would become Infinity")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)
_FOREIGN_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


def check_depth(text: str) -> None:
    """Raises JsonError where arrays and objects are nested deeper than `DEPTH_LIMIT`."""
    if text.count("[") + text.count("{") > DEPTH_LIMIT:
        brackets = _BRACKET.findall(_STRING.sub("", text))  # those inside strings do not count
        if max(accumulate(1 if bracket in "[{" else -1 for bracket in brackets), default=0) > DEPTH_LIMIT:
            raise JsonError(f"nested deeper than {DEPTH_LIMIT} levels")


def check_text(value: Any) -> None:
    """Raises JsonError where a string in `value` holds half of a surrogate pair, which no UTF-8 text can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise JsonError(f"lone surrogate \\u{ord(error.object[error.start]):04x}: half of a character") from None


def decode_at(text: str, start: int, decoder: json.JSONDecoder = _DECODER) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and where it ends. Depth is the caller's to check.

    Raises:
        JsonError: It is malformed, or holds a duplicate key, NaN, Infinity or a lone surrogate.
    """
    try:
        value, end = decoder.raw_decode(text, start)
    except JsonError:
        raise
    except json.JSONDecodeError as error:
        what = error.msg[0].lower() + error.msg[1:].removesuffix(" starting at")
        raise JsonError(f"invalid JSON: {what}", error.pos) from None
    except RecursionError:
        raise JsonError(f"nested deeper than {DEPTH_LIMIT} levels") from None
    except ValueError:  # an integer of more digits than Python converts
        raise JsonError("invalid JSON: a number has too many digits") from None
    if text.find("\\u", start, end) >= 0:
        check_text(value)
    return value, end


def parse_json(text: str, *, constants: bool = False) -> Any:
    """The one JSON value that `text` holds.

    Args:
        constants: Whether NaN and Infinity are let through, which Python writes and configs of some models hold.

    Raises:
        JsonError: It is malformed, nested too deep, or holds a duplicate key, NaN, Infinity or a lone surrogate.
    """
    check_depth(text)
    start = len(text) - len(text.lstrip(" \t\r\n"))
    value, end = decode_at(text, start, _FOREIGN_DECODER if constants else _DECODER)
    rest = text[end:].lstrip(" \t\r\n")
    if rest:
        raise JsonError("invalid JSON: extra data behind the value", len(text) - len(rest))
    return value


def read_regular_file(path: Path, most_bytes: int) -> bytes:
    """The first bytes of a regular file; a pipe is not waited for, a device not read.

    Raises:
        OSError: It is missing or cannot be opened.
        JsonError: It is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise JsonError("is not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most_bytes)
    finally:
        os.close(descriptor)


def read_json_file(path: Path, *, limit_bytes: int = FILE_LIMIT_BYTES, constants: bool = False) -> Any:
    """The JSON value in a file.

    Args:
        path: The file.
        limit_bytes: A larger one is refused.
        constants: See `parse_json`.

    Raises:
        FileNotFoundError: There is none.
        JsonError: It cannot be read, is no regular file, too large, not UTF-8, or not JSON that can be relied on;
            `what` is said of the file, e.g. `is not a regular file`.
    """
    try:
        raw = read_regular_file(path, limit_bytes + 1)
        if len(raw) > limit_bytes:
            raise JsonError(f"is larger than {limit_bytes >> 20} MiB")
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError:
        raise JsonError("is not UTF-8") from None
    except OSError as error:
        raise JsonError(f"cannot be read ({(error.strerror or type(error).__name__).lower()})") from error
    try:
        return parse_json(text, constants=constants)
    except JsonError as error:
        raise JsonError(f"is no valid JSON ({error.what.removeprefix('invalid JSON: ')})", error.position) from None


def read_object_file(path: Path, *, limit_bytes: int = FILE_LIMIT_BYTES, constants: bool = False) -> JsonObject:
    """The JSON object in a file; a file that is missing is a JsonError here like everything else.

    Raises:
        JsonError: As `read_json_file`, or `is missing`, or `is no JSON object`.
    """
    try:
        value = read_json_file(path, limit_bytes=limit_bytes, constants=constants)
    except FileNotFoundError:
        raise JsonError("is missing") from None
    if not isinstance(value, dict):
        raise JsonError("is no JSON object")
    return value
