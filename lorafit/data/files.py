"""A local data file before its rows are read: is it there, is it what it claims to be, what is its hash.

Nothing heavy is imported, so that a missing or torn file is an error within milliseconds.
"""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lorafit.errors import DataError, SafetyError
from lorafit.kinds.fields import shorten
from lorafit.registry import nearest

LINE_LIMIT_BYTES = 16 << 20
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
_TEXT_SUFFIXES = frozenset(SUFFIXES) - {".parquet"}
_HEAD_BYTES = 4096
_ENTRIES_LIMIT = 10_000
_READ_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a file holds, as far as a cache must know.

    Attributes:
        sha256: Of its bytes, in hex.
        lines: Newlines in it, a guess at its rows.
        changed_at_ns: Time of its last change, to notice a writer between two looks.
    """

    sha256: str
    size_bytes: int
    lines: int
    changed_at_ns: int


def take_fingerprint(path: Path) -> Fingerprint:
    """Reads the file once, a MiB at a time."""
    digest, lines, size = hashlib.sha256(), 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            lines += chunk.count(b"\n")
            size += len(chunk)
    return Fingerprint(digest.hexdigest(), size, lines, path.stat().st_mtime_ns)


def check_file(path: Path, name: str) -> None:
    """Looks at a file's kind, size and first bytes.

    Args:
        path: The file.
        name: The same as the user named it.

    Raises:
        DataError: It is missing, unreadable, no regular file, empty, a git-lfs pointer, packed, UTF-16, or of a type
            that is not read.
        SafetyError: It is a Python script, or a folder that ships one.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise _folder_error(path, name)
        if path.suffix.lower() == ".py":
            raise SafetyError(
                f"{path.name} is a loading script and was not executed", file=name, todo="name data files"
            )
        if not stat.S_ISREG(mode):
            raise DataError("is not a regular file", file=name)
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except FileNotFoundError:
        raise _missing_error(path, name) from None
    except OSError as error:
        what = f"cannot be read: {(error.strerror or type(error).__name__).lower()}"
        raise DataError(what, file=shorten(name, 80)) from None
    _check_head(head, path.suffix.lower(), name)


def _missing_error(path: Path, name: str) -> DataError:
    beside = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
    close = nearest(path.name, beside, count=1)
    if not path.parent.is_dir():
        return DataError("no such file", file=name, todo=f"there is no folder {path.parent}")
    todo = f"did you mean {close[0]}?" if close else "paths are relative to the recipe's folder"
    return DataError("no such file", file=name, todo=todo)


def _folder_error(path: Path, name: str) -> DataError | SafetyError:
    below = sorted(islice((p.relative_to(path).as_posix() for p in path.rglob("*")), _ENTRIES_LIMIT))
    scripts = [entry for entry in below if entry.endswith(".py")]
    if scripts:
        what = f"ships a loading script, {scripts[0]}, which was not executed"
        return SafetyError(what, file=name, todo="name its data files themselves")
    inside = [entry for entry in below if entry.lower().endswith(SUFFIXES)]
    todo = f"name the files: {', '.join(inside[:5])}" if inside else f"name a file: {', '.join(SUFFIXES)}"
    return DataError("is a folder", file=name, todo=todo)


def _check_head(head: bytes, suffix: str, name: str) -> None:
    if not head:
        raise DataError("no rows: the file is empty", file=name)
    if head.startswith(b"version https://git-lfs"):
        raise DataError("is a git-lfs pointer, not the data", file=name, todo="fetch it with git lfs pull")
    if suffix not in SUFFIXES:
        packed = next((kind for magic, kind in _PACKED.items() if head.startswith(magic)), None)
        what = f"is packed ({packed})" if packed else f"files of type '{suffix}' are not read"
        raise DataError(
            what, file=name, todo=f"{'unpack it' if packed else 'convert it'}; read are {', '.join(SUFFIXES)}"
        )
    if suffix in _TEXT_SUFFIXES:
        if _is_utf16(head):
            raise DataError("is UTF-16, not UTF-8", file=name, todo="save it as UTF-8")
        if head.startswith((*_PACKED, b"PAR1")):
            raise DataError(f"holds packed or binary data, not {suffix[1:]}", file=name)
        if re.match(rb"\s*<(!doctype html|html)", head, re.IGNORECASE):
            raise DataError("is a web page, not data", file=name, todo="download the file itself")


def _is_utf16(head: bytes) -> bool:
    """Whether text begins with a UTF-16 or UTF-32 mark, or has its pattern of NULs."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        return True
    fewer, more = sorted(half.count(0) / (len(head) / 2) for half in (head[0::2], head[1::2]))
    return len(head) >= 8 and fewer < 0.1 and more > 0.4


def read_lines(path: Path) -> Iterator[tuple[int, str | DataError]]:
    """Every line with its number, its end kept; a line that cannot be used comes as the error that says why.

    At most `LINE_LIMIT_BYTES` are held at a time. Lines end at `\\n` alone; a byte order mark is left out.
    """
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(LINE_LIMIT_BYTES + 2):
            number += 1
            if number == 1:
                raw = raw.removeprefix(_BOM)
            if len(raw.rstrip(b"\r\n")) > LINE_LIMIT_BYTES:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(_READ_BYTES)
                limit = f"{LINE_LIMIT_BYTES >> 20} MiB"
                yield number, DataError(f"longer than {limit}, the limit of a row", todo="cut it into several rows")
            else:
                yield number, _decode(raw)


def _decode(raw: bytes) -> str | DataError:
    if b"\0" in raw:
        place = raw.index(b"\0") + 1
        return DataError(f"NUL byte at column {place}: a torn write, or not a text file", todo="write the file again")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"not valid UTF-8: byte 0x{raw[error.start]:02X} at column {error.start + 1}"
        return DataError(what, todo="save the file as UTF-8")
