"""A recipe as it was written: values with the place they stand at, before anything is known about their meaning.

    adapter:            Entry({...}, key_place=1:1, place=2:3)
      dropout: 0.1      Entry(0.1,   key_place=2:3, place=2:12)

A key path is `("data", "train", 0, "path")`, written `data.train[0].path`. Trees never change: edits make new ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple, Union

from lorafit.errors import RecipeError

Scalar = str | int | float | bool | None
Plain = Union[dict[str, "Plain"], list["Plain"], Scalar]  # noqa: UP007 (a forward reference takes no `|`)
"""Values without their places."""
Value = Union[dict[str, "Entry"], tuple["Entry", ...], Scalar, "Unreadable"]
"""What one entry holds."""
KeyPath = tuple[str | int, ...]
_SEGMENT = re.compile(r"([^.\[\]]+)((?:\[\d+\])*)")
_SHOWN_CHARACTERS = 40
_KEY_CHARACTERS = 100


class Unreadable(Enum):
    """Stand-in for a value that could not be read. The error is already known, so nobody reports it again."""

    VALUE = "unreadable"


class Place(NamedTuple):
    """A position in a file as the user would name it, or a flag such as `--set seed=1`, which has no lines.

    Attributes:
        line: From 1.
        column: From 1.
    """

    file: str
    line: int | None = None
    column: int | None = None

    def error(self, what: str, path: KeyPath = (), todo: str | None = None) -> RecipeError:
        """Makes an error at this place, about the key at `path`."""
        key = key_text(path)
        key = key if len(key) <= _KEY_CHARACTERS else f"{key[: _KEY_CHARACTERS - 1]}…"
        return RecipeError(what, **self._asdict(), key=key or None, todo=todo)


@dataclass(frozen=True, slots=True)
class Entry:
    """One value of a recipe.

    Attributes:
        value: A dict of entries, a tuple of entries, a scalar, or `Unreadable.VALUE`.
        place: Where the value starts.
        key_place: Where its key starts; the value's own place for list items and the whole recipe.
    """

    value: Value
    place: Place
    key_place: Place

    @property
    def at(self) -> Place:
        """The place that an error about the entry points to: a scalar itself, the key of a mapping or list."""
        return self.key_place if isinstance(self.value, dict | tuple) else self.place

    @property
    def entries(self) -> dict[str, Entry]:
        """The entries of a mapping by key; empty for everything else."""
        return self.value if isinstance(self.value, dict) else {}


def entry_of(value: Plain | tuple[Plain, ...], place: Place) -> Entry:
    """Plain values as a tree that stands at one place."""
    if isinstance(value, dict):
        return Entry({key: entry_of(below, place) for key, below in value.items()}, place, place)
    if isinstance(value, list | tuple):
        return Entry(tuple(entry_of(item, place) for item in value), place, place)
    return Entry(value, place, place)


def plain(entry: Entry) -> Plain:
    """The values of a tree without their places. What could not be read is left out, a list with such an item whole."""
    if isinstance(entry.value, dict):
        return {key: plain(below) for key, below in entry.value.items() if _is_readable(below)}
    if isinstance(entry.value, tuple):
        return [plain(item) for item in entry.value]
    return None if isinstance(entry.value, Unreadable) else entry.value


def _is_readable(entry: Entry) -> bool:
    if isinstance(entry.value, tuple):
        return all(_is_readable(item) for item in entry.value)
    return entry.value is not Unreadable.VALUE


def key_text(path: KeyPath) -> str:
    """`("data", "train", 0, "path")` as `data.train[0].path`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def parse_key(text: str) -> KeyPath:
    """`data.train[0].path` (or `data.train.0.path`) as a key path; numbers behind a dot stay text.

    Raises:
        ValueError: It is no key path.
    """
    path: list[str | int] = []
    for segment in text.split("."):
        match = _SEGMENT.fullmatch(segment.strip())
        if match is None:
            raise ValueError(f"'{text}' is not a key such as training.epochs or data.train[0].path")
        path.append(match[1])
        path.extend(int(number) for number in re.findall(r"\d+", match[2]))
    return tuple(path)


def overlap(one: KeyPath, other: KeyPath) -> bool:
    """Whether two paths are the same, or one lies inside of the other."""
    return all(a == b for a, b in zip(one, other, strict=False))


def _below(entry: Entry | None, part: str | int) -> Entry | None:
    if entry is not None and isinstance(entry.value, tuple) and isinstance(part, int) and part < len(entry.value):
        return entry.value[part]
    return entry.entries.get(part) if entry is not None and isinstance(part, str) else None


def find(entry: Entry | None, path: KeyPath) -> Entry | None:
    """The entry at `path`; None where nothing was written."""
    for part in path:
        entry = _below(entry, part)
    return entry


def nearest_entry(entry: Entry, path: KeyPath) -> Entry:
    """The entry at `path`, or the innermost one around it that was written."""
    for part in path:
        below = _below(entry, part)
        if below is None:
            break
        entry = below
    return entry


def with_entry(entry: Entry, path: KeyPath, new: Entry | None) -> Entry:
    """The tree with `new` at `path`, whose parent must exist as a mapping or list; None takes a mapping's key away."""
    if not path:
        return new if new is not None else replace(entry, value=Unreadable.VALUE)
    part, rest = path[0], path[1:]
    if isinstance(entry.value, tuple) and isinstance(part, int):
        changed = with_entry(entry.value[part], rest, new)
        return replace(entry, value=(*entry.value[:part], changed, *entry.value[part + 1 :]))
    if not isinstance(entry.value, dict) or not isinstance(part, str):
        raise KeyError(key_text(path))
    if rest:
        new = with_entry(entry.value[part], rest, new)
    others = {key: below for key, below in entry.value.items() if new is not None or key != part}
    return replace(entry, value=others if new is None else {**others, part: new})


def walk(entry: Entry, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Entry]]:
    """Every entry with its path, outer ones first."""
    yield path, entry
    below = enumerate(entry.value) if isinstance(entry.value, tuple) else entry.entries.items()
    for part, inner in below:
        yield from walk(inner, (*path, part))


def shown(value: Entry | Value | Plain) -> str:
    """A value for a message: text in quotes and cut to a few words, everything else by its form."""
    held = value.value if isinstance(value, Entry) else value
    if held is None:
        return "nothing"
    if isinstance(held, bool):
        return "true" if held else "false"
    if isinstance(held, dict):
        return "a mapping" if held else "an empty mapping"
    if isinstance(held, list | tuple):
        return f"a list of {len(held)}" if held else "an empty list"
    text = str(held)
    if len(text) > _SHOWN_CHARACTERS:
        text = text[: _SHOWN_CHARACTERS - 1] + "…"
    return repr(text) if isinstance(held, str) else text
