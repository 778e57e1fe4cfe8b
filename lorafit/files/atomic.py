"""Files and folders that get to their place whole or not at all.

A folder is written to a temporary sibling, fsynced, hashed into a MANIFEST that is written last, and renamed. A folder
without a valid MANIFEST does not exist for a reader.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import CheckpointError, LorafitError, ResourceError, UsageError
from lorafit.files.strict_json import JsonError, read_object_file

FORMAT = 1
"""Of the files of a run and of every MANIFEST; a file that names another one was written by another lorafit."""
MANIFEST = "MANIFEST"
TEMPORARY_PREFIX = ".tmp-"
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust's libraries (safetensors, tokenizers) tell an errno
DISK_ERRORS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "file too large for the limit set here",
    errno.EIO: "input/output error",
    errno.EROFS: "read-only file system",
}


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk, a quota, an I/O error or a read-only disk into a ResourceError that names `path`."""
    try:
        yield
    except Exception as error:
        told = _OS_ERROR.search(str(error)) if not isinstance(error, OSError | LorafitError) else None
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number in DISK_ERRORS:
            todo = "free or change the disk; what was saved before is intact"
            raise ResourceError(DISK_ERRORS[number], file=str(path), todo=todo) from error
        raise


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it; raises UsageError where the system has another reason than a bad disk."""
    with disk_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise
            what = f"the folder cannot be made: {(error.strerror or type(error).__name__).lower()}"
            raise UsageError(what, file=str(folder), todo="choose another folder") from error


@contextlib.contextmanager
def _sibling(path: Path, *, is_folder: bool) -> Iterator[Path]:
    """A temporary place beside `path` to write at: a new folder, or the name of a file. What is left there goes.

    Raises:
        ResourceError: The disk is full, read-only or broken, or somebody removed the folder; `path` is as it was.
        UsageError: Nothing can be made there.
    """
    temporary = path.parent / f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}"
    made = temporary if is_folder else path.parent
    with disk_errors(path):
        make_folder(path.parent)
        _remove(temporary)
        try:
            _try_making(temporary, path, is_folder=is_folder)
            yield temporary
        except LorafitError:
            raise
        except Exception as error:
            missing = str(error.filename) if isinstance(error, FileNotFoundError) else ""
            if made.is_dir() and not missing.startswith(str(temporary)):
                raise
            todo = "was its folder removed? leave it alone and start again"
            raise ResourceError("disappeared while it was written", file=str(path), todo=todo) from error
        finally:
            _remove(temporary)


def _try_making(temporary: Path, path: Path, *, is_folder: bool) -> None:
    """Makes the folder, or sees that a file can be made. Raises UsageError where the system refuses, as /proc does."""
    try:
        if is_folder:
            temporary.mkdir(mode=0o755)  # not the umask's: what others may write into, the cache would not trust
        else:
            temporary.touch()
            temporary.unlink()
    except OSError as error:
        if error.errno in DISK_ERRORS or not path.parent.is_dir():
            raise
        why = "the system lets nothing be made there" if error.errno == errno.ENOENT else (error.strerror or "").lower()
        raise UsageError(f"cannot be written: {why}", file=str(path), todo="choose another place") from error


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling to write to; on success it is fsynced and takes `path`'s place, else it is removed.

    Raises:
        ResourceError: The disk is full, read-only or broken; `path` is as it was.
    """
    with _sibling(path, is_folder=False) as temporary:
        yield temporary
        temporary.chmod(0o644)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically; NaN and Infinity are refused."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_object(path: Path) -> JsonObject:
    """The object in a JSON file of a run folder.

    Raises:
        CheckpointError: It is missing, no JSON object that can be relied on, or of another format.
    """
    try:
        value = read_object_file(path)
    except JsonError as error:
        todo = "restore it" if path.exists() else "is this folder a whole run?"
        raise CheckpointError(error.what, file=str(path), todo=todo) from error
    check_format(value, path)
    return value


def check_format(value: JsonMapping, path: Path) -> None:
    """Raises CheckpointError where a file says that it was written in another format than this lorafit's."""
    for key in ("format", "version"):
        if value.get(key, FORMAT) != FORMAT:
            raise CheckpointError(
                f"is of {key} {value[key]!r}, this lorafit reads {key} {FORMAT}",
                file=str(path),
                todo="use the lorafit that wrote it",
            )


@contextlib.contextmanager
def atomic_dir(
    path: Path, *, replace: bool = False, digests: Mapping[str, str] | None = None, lists_files: bool = True
) -> Iterator[Path]:
    """Yields a temporary sibling folder to fill; on success it gets its MANIFEST and becomes `path`.

    Args:
        path: The folder that shall exist, whole, afterwards.
        replace: Whether an existing `path` gives way (it is moved aside first, and removed last).
        digests: SHA-256 by relative name of files that were hashed while they were written; others are read again.
        lists_files: Whether it gets a MANIFEST; what is for other programs gets none.

    Raises:
        ResourceError: The disk is full, read-only or broken; `path` is as it was.
        UsageError: `path` exists and `replace` is false.
    """
    with _sibling(path, is_folder=True) as temporary:
        yield temporary
        entries = {}
        for file in sorted(file for file in temporary.rglob("*") if file.is_file() and file.name != MANIFEST):
            file.chmod(0o644)
            _sync(file)
            name = file.relative_to(temporary).as_posix()
            known = (digests or {}).get(name) if lists_files else ""
            entries[name] = {"bytes": file.stat().st_size, "sha256": hash_file(file) if known is None else known}
        if lists_files:
            manifest, listed = temporary / MANIFEST, {"format": FORMAT, "files": entries}
            manifest.write_text(json.dumps(listed, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            _sync(manifest)
        for folder in [*(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
            _sync(folder)
        if path.exists() and not replace:
            raise UsageError("exists already", file=str(path), todo="choose another --output")
        aside = path.parent / f"{TEMPORARY_PREFIX}old-{path.name}-{os.getpid()}"
        if path.exists():
            path.rename(aside)
        temporary.rename(path)
        _sync(path.parent)
        _remove(aside)


def check_manifest(folder: Path, *, hashes: bool = True, hash_of: Callable[[Path], str] = hash_file) -> str | None:
    """Why the folder is not whole, or None where every file has the size and hash of its MANIFEST.

    Args:
        folder: What was made by `atomic_dir`.
        hashes: Whether the files are read; else their sizes alone are compared.
        hash_of: Gives a file's SHA-256.
    """
    try:
        for name, entry in read_object(folder / MANIFEST)["files"].items():
            file = folder / name
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                return f"{MANIFEST} names a file outside of its folder"
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, its size should be {entry['bytes']}"
            if hashes and hash_of(file) != entry["sha256"]:
                return f"{name} does not match its checksum"
    except CheckpointError as error:
        return f"{MANIFEST} {error.what}"
    except (OSError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def require_manifest(folder: Path, *, hash_of: Callable[[Path], str] = hash_file) -> None:
    """Raises CheckpointError where a folder is not what its MANIFEST says, or that has an unknown format."""
    reason = check_manifest(folder, hash_of=hash_of)
    if reason is not None:
        raise CheckpointError(
            f"is not what its {MANIFEST} says: {reason}", file=str(folder), todo="restore it from a copy"
        )
