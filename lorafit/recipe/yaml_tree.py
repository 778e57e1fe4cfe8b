"""A recipe as it was written: values with the place they stand at, before anything is known about their meaning.

    adapter:            Entry({...}, key_place=1:1, place=2:3)
      dropout: 0.1      Entry(0.1,   key_place=2:3, place=2:12)

A key path is `("data", "train", 0, "path")`, written `data.train[0].path`. Trees never change: edits make new ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

KeyPath = tuple[str | int, ...]
_SEGMENT = re.compile(r"([^.\[\]]+)((?:\[\d+\])*)")
_SHOWN_CHARACTERS = 40


class Unreadable(Enum):
    """What stands where a value could not be read. The error is already known, so nobody reports it again."""

    VALUE = "unreadable"


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands: a file as the user would name it, or a flag such as `--set seed=1`, which has no lines.

    Attributes:
        line: From 1.
        column: From 1.
    """

    file: str
    line: int | None = None
    column: int | None = None

    @property
    def known(self) -> dict[str, Any]:
        """As arguments of an error."""
        return {"file": self.file, "line": self.line, "column": self.column}


@dataclass(frozen=True, slots=True)
class Entry:
    """One value of a recipe.

    Attributes:
        value: A dict of entries, a tuple of entries, a scalar, or `Unreadable.VALUE`.
        place: Where the value starts.
        key_place: Where its key starts; the value's own place for list items and the whole recipe.
        count: How many values it holds, itself included (aliases counted as often as they are used).
    """

    value: Any
    place: Place
    key_place: Place
    count: int = 1

    @property
    def at(self) -> Place:
        """Where an error about it points: at a scalar itself, at the key of a mapping or list."""
        return self.key_place if isinstance(self.value, dict | tuple) else self.place


def mapping(entries: Mapping[str, Entry], place: Place, key_place: Place | None = None) -> Entry:
    """A mapping of entries as an entry."""
    return Entry(dict(entries), place, key_place or place, 1 + sum(e.count for e in entries.values()))


def entry_of(value: Any, place: Place) -> Entry:
    """Plain values as a tree that stands at one place."""
    if isinstance(value, dict):
        return mapping({key: entry_of(below, place) for key, below in value.items()}, place)
    if isinstance(value, list | tuple):
        items = tuple(entry_of(item, place) for item in value)
        return Entry(items, place, place, 1 + sum(item.count for item in items))
    return Entry(value, place, place)


def key_text(path: KeyPath) -> str:
    """`("data", "train", 0, "path")` as `data.train[0].path`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


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


def find(entry: Entry, path: KeyPath) -> Entry | None:
    """The entry at `path`; None where nothing was written."""
    for part in path:
        below = _below(entry, part)
        if below is None:
            return None
        entry = below
    return entry


def _below(entry: Entry, part: str | int) -> Entry | None:
    if isinstance(entry.value, dict) and isinstance(part, str):
        return entry.value.get(part)
    if isinstance(entry.value, tuple) and isinstance(part, int) and part < len(entry.value):
        item: Entry = entry.value[part]
        return item
    return None


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
    if isinstance(entry.value, dict) and isinstance(part, str):
        entries = dict(entry.value)
        if rest:
            entries[part] = with_entry(entries[part], rest, new)
        elif new is not None:
            entries[part] = new
        else:
            entries.pop(part, None)
        return mapping(entries, entry.place, entry.key_place)
    if isinstance(entry.value, tuple) and isinstance(part, int):
        items = list(entry.value)
        items[part] = with_entry(items[part], rest, new)
        return replace(entry, value=tuple(items), count=1 + sum(e.count for e in items))
    raise KeyError(key_text(path))


def walk(entry: Entry, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Entry]]:
    """Every entry with its path, outer ones first."""
    yield path, entry
    if isinstance(entry.value, dict):
        for key, below in entry.value.items():
            yield from walk(below, (*path, key))
    elif isinstance(entry.value, tuple):
        for number, below in enumerate(entry.value):
            yield from walk(below, (*path, number))


def shown(value: Any) -> str:
    """A value for a message: text in quotes and cut to a few words, everything else by its form."""
    if isinstance(value, Entry):
        value = value.value
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    text = str(value)
    if len(text) > _SHOWN_CHARACTERS:
        text = text[: _SHOWN_CHARACTERS - 1] + "…"
    return repr(text) if isinstance(value, str) else text
