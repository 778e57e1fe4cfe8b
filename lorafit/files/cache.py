"""What lorafit keeps between commands, and whom it trusts there: nobody but the one who runs it.

    $LORAFIT_CACHE (default ~/.cache/lorafit)
      bases/SHA256/     converted GGUF files           data/KEY/     prepared rows
      plans/KEY.json    what a first run settled       hashes/KEY.json   hashes of large files, see `remember`
      shapes, steps, configs   what a class, a dry run or a GGUF file's header told of a model, see `keep`

A MANIFEST proves nothing against the one who wrote it. So each folder on the way to an entry must belong to the user
(or to root), be closed to others' writing, and be no link; a lock is opened without following one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from lorafit.errors import IN_MEMORY, LorafitError, ResourceError, SafetyError
from lorafit.files.atomic import hash_file, write_json
from lorafit.files.strict_json import JsonError, read_json_file
from lorafit.machine.version import installed_versions

T = TypeVar("T", str, dict[str, str])

_FOLDER_MODE = 0o700
_SETTLED_SECONDS = 2.0
"""A file changed less than this ago may change again within one tick of its clock, so its hash is not kept."""


def cache_folder() -> Path:
    """`$LORAFIT_CACHE`, else `~/.cache/lorafit`."""
    return Path(os.environ.get("LORAFIT_CACHE") or Path.home() / ".cache" / "lorafit")


def memory_rows(path: Path) -> str | None:
    """The parameter that a program gave rows as, of the file that holds them here; None for any other file."""
    if path.stem not in IN_MEMORY:
        return None
    is_kept = path.resolve().parent.parent == (cache_folder() / "rows").resolve()
    return path.stem if is_kept else None


def settle_home() -> str | None:
    """Gives a process without a home one among the temporary files: its libraries ask for one as well.

    A container may run with a user id that no passwd entry knows, and without $HOME.

    Returns:
        What to tell the user, where the cache lies there too; None for everybody else.

    Raises:
        SafetyError: Somebody else has that folder.
    """
    try:
        Path.home()
        return None
    except RuntimeError:
        home = Path(tempfile.gettempdir()) / f"lorafit-home-{os.geteuid()}"
    os.environ["HOME"] = str(home)
    own_folder(home)
    if os.environ.get("LORAFIT_CACHE"):
        return None
    return f"no home folder is known: the cache is in {home}; set LORAFIT_CACHE to a folder that lasts"


def own_folder(folder: Path) -> Path:
    """Makes a folder of the cache where it is not there yet, for the user alone. Returns it.

    Raises:
        SafetyError: Others may write into it, or into a folder of the cache above it.
        ResourceError: It cannot be made.
    """
    for part in _ways(folder):
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            part.mkdir(mode=_FOLDER_MODE, exist_ok=True)
        except OSError as error:
            if part.is_symlink():
                break  # said below
            raise _not_written("the cache folder", part, error) from None
    refuse_foreign(folder)
    return folder


def refuse_foreign(folder: Path) -> None:
    """Raises SafetyError where others may have put there what lies in a folder of the cache."""
    for part in _ways(folder):
        reason = _why_foreign(part)
        if reason is not None:
            raise SafetyError(
                f"the cache folder {reason}, so what lies in it cannot be trusted",
                file=str(part),
                todo="close it to others (chmod -R go-w), or set LORAFIT_CACHE to a folder of your own",
            )


def _ways(folder: Path) -> Iterator[Path]:
    """The folders of the cache from its root down to `folder`; that one alone where it lies outside of the cache.

    The root may be reached through links: that is what its user set up.
    """
    root = cache_folder()
    if folder != root and not folder.is_relative_to(root):
        yield folder
        return
    place = Path(os.path.realpath(root))
    yield place
    for name in folder.relative_to(root).parts:
        place /= name
        yield place


def _why_foreign(folder: Path) -> str | None:
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode):
        return "is a link"
    if found.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user ({found.st_uid})"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"may be written by others (mode {stat.S_IMODE(found.st_mode):o})"
    return None


@contextlib.contextmanager
def locked(path: Path, waits: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds an exclusive lock on a file of the cache; where the file system knows no locks, goes on without.

    Args:
        path: The lock's file; made where it is not there. Its content is never touched.
        waits: Called before the wait where another process has it.

    Raises:
        SafetyError: It is a link or no regular file, or lies where others may write.
    """
    own_folder(path.parent)
    foreign = SafetyError("is no plain file, where a lock of the cache belongs", file=str(path), todo="remove it")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        if path.is_symlink() or path.is_dir():
            raise foreign from None
        raise _not_written("the cache", path, error) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise foreign
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waits()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _not_written(what: str, path: Path, error: OSError) -> ResourceError:
    why = (error.strerror or type(error).__name__).lower()
    todo = "set LORAFIT_CACHE to a folder that can"
    return ResourceError(f"{what} cannot be written: {why}", file=str(path), todo=todo)


@cache
def _code() -> tuple[str, ...]:
    """The libraries and a hash of lorafit's own code: all of what computes."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return (*installed_versions().values(), digest.hexdigest())


def key_of_code(parts: object) -> str:
    """A name for what this very code with these libraries says of some values, which are read as JSON."""
    text = json.dumps([parts, _code()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def kept(name: str) -> Any:
    """The JSON value that `keep` kept under a name; None where there is none, or nothing that can be read."""
    try:
        return read_json_file(cache_folder() / name)
    except (OSError, JsonError):
        return None


def keep(name: str, value: object) -> None:
    """Keeps a JSON value for later commands; where it cannot be written, that costs them some time, no more."""
    file = cache_folder() / name
    with contextlib.suppress(OSError, LorafitError):
        own_folder(file.parent)
        write_json(file, value)


def known_hash(file: Path) -> str:
    """SHA-256 of a file's bytes, read only where the file is not the one that was read before."""
    return remember("file", file, hash_file)


def remember(kind: str, file: Path, compute: Callable[[Path], T]) -> T:
    """What `compute` says of a large file, kept in the cache for as long as the file stays the same.

    The file is known by its real path, inode, size and times of change, in nanoseconds; writing to it changes one of
    them. Kept values are believed only where nobody else can have written them.
    """
    folder = cache_folder() / "hashes"
    before = _stamp(file)
    name = hashlib.sha256(os.fsencode(f"{kind}:{os.path.realpath(file)}")).hexdigest()[:40]
    memo = folder / f"{name}.json"
    usable = all(_why_foreign(part) is None for part in _ways(folder))
    if usable and (known := _read_memo(memo, before)) is not None:
        return known  # type: ignore[return-value]
    value = compute(file)
    is_settled = time.time() - max(before[2:]) / 1e9 > _SETTLED_SECONDS
    if usable and is_settled and _stamp(file) == before:
        with contextlib.suppress(OSError, LorafitError):  # costs the next command some time, no more
            own_folder(folder)
            write_json(memo, {"stamp": before, "value": value})
    return value


def _stamp(file: Path) -> list[int]:
    now = file.stat()
    return [now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns]


def _read_memo(memo: Path, stamp: list[int]) -> object | None:
    try:
        stored = read_json_file(memo)
        return stored["value"] if stored["stamp"] == stamp else None
    except (OSError, JsonError, KeyError, TypeError):
        return None
