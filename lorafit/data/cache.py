"""Prepared rows kept by the content they were made of.

    $LORAFIT_CACHE/data/
      KEY/                       a store (see lorafit.data.store), report.json, MANIFEST; whole or not there
      index/PLACE.json           what KEY was last made of, for sources at the same place: names the reason of a miss
      locks/KEY                  held while KEY is built, so that two processes do not build it twice

KEY is a hash of parts: the bytes of the sources, the tokenizer, the chat template, the options, the code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from lorafit.files.atomic import TEMPORARY_PREFIX, atomic_dir, check_manifest, write_json
from lorafit.files.cache import locked, own_folder, refuse_foreign
from lorafit.files.strict_json import JsonError, read_json_file

Parts = Mapping[str, str]

_CODE = (
    "files/strict_json.py",
    "data/**/*.py",
    "data/templates/*",
    "kinds/*.py",
    "kinds/formats/*.py",
    "kinds/tasks/*.py",
)
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "numpy")


@dataclass(frozen=True, slots=True)
class Lookup:
    """What the cache has for some parts.

    Attributes:
        folder: Where the prepared rows are, or shall be.
        hit: Whether they are there, whole.
        reason: Why, in words, e.g. `cache miss: tokenizer changed`.
    """

    folder: Path
    hit: bool
    reason: str


@lru_cache(maxsize=1)
def code_version() -> str:
    """A hash of the code that makes rows into tokens, ours and the libraries' versions."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for pattern in _CODE:
        for file in sorted(package.glob(pattern)):
            digest.update(file.name.encode() + file.read_bytes())
    for library in _LIBRARIES:
        digest.update(f"{library} {metadata.version(library)}".encode())
    return digest.hexdigest()


class PreparedCache:
    """The folder of prepared rows.

    Raises:
        ResourceError: It cannot be written to.
        SafetyError: Others may write into it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for part in (folder, folder / "index", folder / "locks"):
            own_folder(part)

    def find(self, parts: Parts, place: str, spoken: Mapping[str, str] | None = None) -> Lookup:
        """Looks for rows made of `parts`.

        Args:
            parts: What the rows are made of: a hash by what it is. Names of files are no part of it.
            place: Where the sources are, to compare with what was there before.
            spoken: What parts are called in the reason of a miss, where that is not their own name.
        """
        folder = self._folder / _hash(parts)
        refuse_foreign(folder)
        if folder.is_dir():
            damage = check_manifest(folder)
            if damage is None:
                return Lookup(folder, True, "cache hit: sources, tokenizer, template, options and code are the same")
            return Lookup(folder, False, f"cache miss: the cached copy is damaged ({damage})")
        return Lookup(folder, False, f"cache miss: {self._compare(parts, place, spoken or {})}")

    def _compare(self, parts: Parts, place: str, spoken: Mapping[str, str]) -> str:
        before = _read_json(self._index(place))
        if not isinstance(before, dict):
            return "not prepared before"
        changed = [part for part in parts if before.get(part) != parts[part]]
        changed += [part for part in before if part not in parts]
        named = ", ".join(spoken.get(part, part) for part in changed)
        return f"{named} changed" if changed else "the cached copy was removed"

    def _index(self, place: str) -> Path:
        return self._folder / "index" / f"{hashlib.sha256(place.encode()).hexdigest()[:32]}.json"

    def remember(self, parts: Parts, place: str) -> None:
        """Notes what the rows from `place` are made of now."""
        if _read_json(self._index(place)) != dict(parts):
            write_json(self._index(place), dict(parts))

    def locked(self, parts: Parts, waits: Callable[[], None]) -> AbstractContextManager[None]:
        """Waits until no other process builds the rows made of `parts`, and keeps others from it.

        Args:
            waits: Called before the wait where another process has it.
        """
        return locked(self._folder / "locks" / _hash(parts), waits)

    @contextlib.contextmanager
    def build(self, folder: Path) -> Iterator[Path]:
        """Yields a temporary folder that becomes `folder` whole, or not at all; removes what killed builds left."""
        for leftover in self._folder.glob(f"{TEMPORARY_PREFIX}*{folder.name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with atomic_dir(folder, replace=True) as temporary:
            yield temporary


def _hash(parts: Parts) -> str:
    return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()[:40]


def _read_json(path: Path) -> Any:
    try:
        return read_json_file(path)
    except (OSError, JsonError):
        return None
