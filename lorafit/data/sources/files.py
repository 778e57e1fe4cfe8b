"""A local data file before its rows are read: is it there, is it what it claims to be, what is its hash.

Nothing heavy is imported, so that a missing or torn file is an error within milliseconds.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import os
import re
import stat
import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

from lorafit.console.nearest import nearest
from lorafit.errors import DataError, SafetyError
from lorafit.kinds.fields import shorten
from lorafit.recipe.paths import absolute, is_pattern

LINE_LIMIT_BYTES = 16 << 20
BOMB_FLOOR_BYTES = 64 << 20
BOMB_RATIO = 250
"""Rows that unpack to more than the floor and this many times their packed size are a bomb; text packs 3 to 30 times,
deflate at most 1032 times."""
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".xlsx", ".txt")
PACKED_SUFFIX = ".gz"
_TEXT_SUFFIXES = frozenset(SUFFIXES) - {".parquet", ".xlsx"}
_HEAD_BYTES = 4096
_OBJECT = re.compile(rb'\s*\{[ \t]*"(?:[^"\\\n]|\\.)*"[ \t]*:')
_ENTRIES_LIMIT = 10_000
READ_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
_TABLES = (".xls", ".xlsm", ".xlsb", ".ods", ".numbers")
FILE_SUFFIXES = (*SUFFIXES, *_TABLES, PACKED_SUFFIX, ".py")
"""What only the name of a file ends with: of a kind that is read, or that a message knows."""
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a file holds, as far as a cache must know.

    Attributes:
        sha256: Of its bytes, in hex.
        lines: In it, a guess at its rows.
        changed_at_ns: Time of its last change, to notice a writer between two looks.
    """

    sha256: str
    size_bytes: int
    lines: int
    changed_at_ns: int


def take_fingerprint(path: Path) -> Fingerprint:
    """Reads the file once, a MiB at a time."""
    digest, lines, size, end = hashlib.sha256(), 0, 0, b"\n"
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
            lines += chunk.count(b"\n")
            size += len(chunk)
            end = chunk[-1:]
    lines += end != b"\n"  # the last line
    return Fingerprint(digest.hexdigest(), size, lines, path.stat().st_mtime_ns)


def suffix_of(path: PurePath | str) -> str:
    """What a file's name says that it holds, in lower case: `.csv` for `rows.csv` and for `rows.csv.gz`."""
    suffixes = [suffix.lower() for suffix in PurePath(path).suffixes]
    if suffixes and suffixes[-1] == PACKED_SUFFIX:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_packed(path: PurePath) -> bool:
    """Whether a file's name says that it is packed with gzip."""
    return path.suffix.lower() == PACKED_SUFFIX


def is_bomb(unpacked_bytes: int, packed_bytes: int) -> bool:
    """Whether rows unpack to a size that no honest writer packs so small."""
    return unpacked_bytes > max(BOMB_FLOOR_BYTES, BOMB_RATIO * packed_bytes)


def open_file(path: Path) -> BinaryIO:
    """A file's bytes; of one named `.gz`, what is packed in it, unpacked as it is read.

    Raises:
        DataError: While reading: it is no gzip file, is damaged, or unpacks to a bomb.
    """
    if not is_packed(path):
        return path.open("rb")
    return cast(BinaryIO, io.BufferedReader(_Unpacked(path), READ_BYTES))


class _Unpacked(io.RawIOBase):
    """The content of a gzip file, which is held in no more than a buffer."""

    def __init__(self, path: Path) -> None:
        self._packed_bytes, self._unpacked_bytes = path.stat().st_size, 0
        self._file = gzip.open(path, "rb")  # noqa: SIM115 - closed by close

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count = self._file.readinto(buffer)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            what = "ends early" if isinstance(error, EOFError) else "is damaged, or not packed with gzip"
            raise DataError(what, todo="fetch or pack it again") from None
        self._unpacked_bytes += count
        if is_bomb(self._unpacked_bytes, self._packed_bytes):
            what = f"unpacks to more than {BOMB_RATIO} times its {self._packed_bytes:,} bytes"
            raise DataError(what, todo="unpack it yourself if that is right")
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def check_file(path: Path, name: str, *, start: str = "the recipe's folder") -> None:
    """Looks at a file's kind, size and first bytes.

    Args:
        name: The same as the user named it.
        start: What messages call the folder that relative paths start from.

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
        with open_file(path) as file:
            head = file.read(_HEAD_BYTES)
    except DataError as error:
        raise error.at(file=name) from None
    except FileNotFoundError:
        raise _missing_error(path, name, start) from None
    except OSError as error:
        what = f"cannot be read: {(error.strerror or type(error).__name__).lower()}"
        raise DataError(what, file=shorten(name, 80)) from None
    _check_head(head, suffix_of(path), name, is_packed=is_packed(path))


def _missing_error(path: Path, name: str, start: str) -> DataError:
    beside = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
    close = nearest(path.name, beside, count=1)
    if not path.parent.is_dir() and spelled_from(path, name) is None:
        return DataError("no such file", file=name, todo=f"there is no folder {path.parent}")
    todo = f"did you mean {close[0]}?" if close else f"paths are relative to {start}; looked in {absolute(path.parent)}"
    if (here := spelled_from(path, name)) is not None:  # seen from the working folder, as flags are typed
        todo = f"paths are relative to {start}: write {here}"
    return DataError("no such file", file=name, todo=todo)


def spelled_from(path: Path, name: str) -> str | None:
    """How a file that the working folder has is written from the folder that `path`, which is not there, starts in.

    None where the working folder has no such file either, or the name starts nowhere.
    """
    written = PurePath(name)
    if written.is_absolute() or name.startswith("~") or not Path(name).exists():
        return None
    start = Path(str(path)[: -len(str(written))] or ".")
    return Path(os.path.relpath(Path(name).absolute(), start.absolute())).as_posix()


def _folder_error(path: Path, name: str) -> DataError | SafetyError:
    below = sorted(islice((p.relative_to(path).as_posix() for p in path.rglob("*")), _ENTRIES_LIMIT))
    scripts = [entry for entry in below if entry.endswith(".py")]
    inside = [entry for entry in below if suffix_of(entry) in SUFFIXES]
    todo = f"name a file: {', '.join(SUFFIXES)}"
    if inside:
        kinds = Counter(entry[entry.lower().rindex(suffix_of(entry)) :] for entry in inside)
        most = kinds.most_common(1)[0][0]  # a README.txt beside rows is none of them
        alike = [entry for entry in inside if entry.endswith(most)]
        deep = "**/" if any("/" in entry for entry in alike) else ""
        todo = f"name the files, {', '.join(alike[:3])}, or a pattern, {name.rstrip('/')}/{deep}*{most}"
    if scripts and (not inside or f"{absolute(path).name}.py" in scripts):  # as data sets call theirs
        return SafetyError(f"ships a loading script, {scripts[0]}, which was not executed", file=name, todo=todo)
    beside = f", and its script {scripts[0]} was not executed" if scripts else ""
    return DataError(f"is a folder{beside}", file=name, todo=todo)


def _check_head(head: bytes, suffix: str, name: str, *, is_packed: bool) -> None:
    if not head:
        raise DataError("no rows: the file is empty", file=name)
    if head.startswith(b"version https://git-lfs"):
        raise DataError("is a git-lfs pointer, not the data", file=name, todo="fetch it with git lfs pull")
    if is_packed and suffix in SUFFIXES and suffix not in _TEXT_SUFFIXES:
        raise DataError(f"a {suffix} file is packed by itself", file=name, todo="unpack it once")
    if suffix not in SUFFIXES and not _OBJECT.match(head.removeprefix(BOM)):
        raise _unknown_type(head, suffix, name)
    if suffix in _TEXT_SUFFIXES:
        if _is_utf16(head):
            raise DataError("is UTF-16, not UTF-8", file=name, todo="save it as UTF-8")
        if head.startswith((*_PACKED, b"PAR1")):
            raise DataError(f"holds packed or binary data, not {suffix[1:]}", file=name)
        if re.match(rb"\s*<(!doctype html|html)", head, re.IGNORECASE):
            raise DataError("is a web page, not data", file=name, todo="download the file itself")


def _unknown_type(head: bytes, suffix: str, name: str) -> DataError:
    read = f"read are {', '.join(SUFFIXES)}, the text ones as .gz too"
    if suffix in _TABLES:
        return DataError(f"{suffix} files are not read", file=name, todo="save it as .xlsx or as CSV UTF-8")
    packed = next((kind for magic, kind in _PACKED.items() if head.startswith(magic)), None)
    if packed:
        return DataError(f"is packed ({packed})", file=name, todo=f"unpack it; {read}")
    return DataError(f"files of type '{suffix}' are not read", file=name, todo=f"convert it; {read}")


def _is_utf16(head: bytes) -> bool:
    """Whether text begins with a UTF-16 or UTF-32 mark, or has its pattern of NULs."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        return True
    fewer, more = sorted(half.count(0) / (len(head) / 2) for half in (head[0::2], head[1::2]))
    return len(head) >= 8 and fewer < 0.1 and more > 0.4


def utf8_hint(byte: int) -> str:
    """What to do about a byte that is no UTF-8: in a file of Windows or Excel it is most often a letter of its own."""
    letter = bytes([byte]).decode("cp1252", "ignore")
    seems = f" (in Windows-1252 it is '{letter}')" if letter.isprintable() and letter else ""
    return f"save the file as UTF-8{seems}: in Excel as CSV UTF-8, elsewhere iconv -f WINDOWS-1252 -t UTF-8"


MOST_FILES = 10_000


def find_files(path: str, folder: Path, *, start: str = "the recipe's folder") -> list[str]:
    """The files that a pattern stands for, sorted by name; the path itself where it is no pattern.

    A pattern holds `*`, `?` or `[...]`, and is no file's own name; `**` stands for folders of any depth.

    Args:
        path: A path, a pattern, or a hub id.
        folder: Where relative ones start.
        start: What messages call that folder.

    Raises:
        DataError: No file matches, or more than `MOST_FILES` do.
    """
    pattern = str(Path(path).expanduser())
    if not is_pattern(path) or os.path.lexists(folder / pattern):
        return [path]
    matches = glob.iglob(pattern, root_dir=folder, recursive=True)  # noqa: PTH207 - absolute patterns, no hidden files
    found = sorted(islice((name for name in matches if (folder / name).is_file()), MOST_FILES + 1))
    if not found:
        raise DataError("no file matches the pattern", file=path, todo=f"patterns start in {start}; ** is any folders")
    if len(found) > MOST_FILES:
        raise DataError(f"more than {MOST_FILES:,} files match", file=path, todo="put their rows into fewer files")
    return found
