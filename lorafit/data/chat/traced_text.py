"""Text that remembers who wrote each of its characters.

`Typed` is a `str` whose characters know the string of the chat they came from (a *leaf*: the content of message 3,
the name of a called function, ...). Plain strings are the template's own. What a template does to strings (adding,
slicing, stripping, splitting, replacing, joining, formatting, JSON) keeps that knowledge:

    '<|im_start|>user\\n' + Typed('hi') + '<|im_end|>'
     ──── template ────     leaf 1        template

A run is `(length, origin, start)`:

    origin  0  the template            start  >= 0  character `start` of the leaf, and on from there
            n  leaf n (from 1)                WHOLE  from the leaf, as a whole, places not known (escaped, repeated)
           <0  a mark, length 0               BLURRED  perhaps from the leaf: an operation that is not followed

Where an operation is not followed the result is blurred, never taken for the template's own text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, SupportsIndex

Run = tuple[int, int, int]

TEMPLATE = 0
WHOLE = -1
BLURRED = -2


class Typed(str):
    """A string with the origin of its characters. Compares, hashes and tests like the plain string.

    Args:
        text: The characters.
        runs: Stretches of equal origin, in order; their lengths add up to `len(text)`.
    """

    __slots__ = ("_runs",)
    _runs: tuple[Run, ...]

    def __new__(cls, text: str, runs: tuple[Run, ...]) -> Typed:
        self = str.__new__(cls, text)
        self._runs = runs
        return self

    def __str__(self) -> Typed:
        return self

    def __add__(self, other: str) -> Typed:
        if not isinstance(other, str):
            return NotImplemented
        return Typed(str.__add__(self, other), self._runs + runs_of(other))

    def __radd__(self, other: str) -> Typed:
        if not isinstance(other, str):
            return NotImplemented
        return Typed(str.__add__(other, self), runs_of(other) + self._runs)

    def __mul__(self, count: SupportsIndex) -> Typed:
        return Typed(str.__mul__(self, count), self._runs * count.__index__())

    __rmul__ = __mul__

    def __getitem__(self, key: SupportsIndex | slice) -> Typed:
        if not isinstance(key, slice):
            place = range(len(self))[key]
            return self._cut(place, place + 1)
        start, stop, step = key.indices(len(self))
        if step == 1:
            return self._cut(start, max(start, stop))
        return glue_typed([self._cut(place, place + 1) for place in range(start, stop, step)])

    def __iter__(self) -> Iterator[str]:
        return (self._cut(place, place + 1) for place in range(len(self)))

    def _cut(self, start: int, stop: int, keep_marks: bool = False) -> Typed:
        """Characters `start` to `stop`. Marks on the borders stay; with `keep_marks` those outside move to the
        border.
        """
        text = str.__getitem__(self, slice(start, stop))
        runs = self._runs
        if len(runs) == 1:
            length, origin, first = runs[0]
            if length == 0:
                return Typed(text, runs)
            return Typed(text, ((stop - start, origin, first + start if first >= 0 else first),))
        kept: list[Run] = []
        place = 0
        for length, origin, first in runs:
            if length == 0:
                if keep_marks or start <= place <= stop:
                    kept.append((0, origin, first))
                continue
            a, b = max(start, place), min(stop, place + length)
            if a < b:
                kept.append((b - a, origin, first + a - place if first >= 0 else first))
            place += length
        return Typed(text, tuple(kept))

    def strip(self, chars: str | None = None) -> Typed:
        left = len(self) - len(str.lstrip(self, chars))
        return self._cut(left, left + len(str.strip(self, chars)), keep_marks=True)

    def lstrip(self, chars: str | None = None) -> Typed:
        return self._cut(len(self) - len(str.lstrip(self, chars)), len(self), keep_marks=True)

    def rstrip(self, chars: str | None = None) -> Typed:
        return self._cut(0, len(str.rstrip(self, chars)), keep_marks=True)

    def removeprefix(self, prefix: str, /) -> Typed:
        return self._cut(len(prefix), len(self)) if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> Typed:
        return self._cut(0, len(self) - len(suffix)) if suffix and self.endswith(suffix) else self

    def _pieces(self, parts: Iterable[str], gap: int = 0) -> list[Any]:
        """The parts of a split, found again one behind the other, `gap` characters between them at least."""
        pieces, place = [], 0
        for part in parts:
            place = str.find(self, part, place)
            pieces.append(self._cut(place, place + len(part)))
            place += len(part) + gap
        return pieces

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(str.split(self, sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(str.rsplit(self, sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        return self._pieces(str.splitlines(self, keepends))

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        return tuple(self._pieces(str.partition(self, sep)))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        return tuple(self._pieces(str.rpartition(self, sep)))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:
            return blur(str.replace(self, old, new, count), self, new)
        return Typed(new, runs_of(new)).join(self._pieces(str.split(self, old, count), len(old)))

    def join(self, pieces: Iterable[str], /) -> Typed:
        parts: list[str] = []
        for piece in pieces:
            parts += [self, piece] if parts else [piece]
        return glue_typed(parts)


def _method(name: str, keeps_places: bool) -> Callable[..., str]:
    """A method of `str` whose result is not followed; one that `keeps_places` is where it is as long as before."""
    plain = getattr(str, name)

    def method(self: Typed, *args: Any, **kwargs: Any) -> str:
        text = plain(self, *args, **kwargs)
        if keeps_places and len(text) == len(self):
            return Typed(text, self._runs)
        return blur(text, self, args, kwargs)

    method.__name__ = name
    return method


_NOT_FOLLOWED = ("casefold", "center", "expandtabs", "ljust", "rjust", "swapcase", "translate", "zfill")
for _name in ("upper", "lower", "title", "capitalize"):
    setattr(Typed, _name, _method(_name, keeps_places=True))
for _name in (*_NOT_FOLLOWED, "__mod__", "__rmod__"):
    setattr(Typed, _name, _method(_name, keeps_places=False))


def typed_leaf(text: str, leaf: int) -> Typed:
    """`text` as it stands in the chat, all of it from leaf number `leaf` (from 1)."""
    return Typed(text, ((len(text), leaf, 0),))


def runs_of(text: str) -> tuple[Run, ...]:
    """The runs of a string; a plain one is the template's."""
    if isinstance(text, Typed):
        return text._runs
    return ((len(text), TEMPLATE, 0),) if text else ()


def glue_typed(pieces: Iterable[str]) -> Typed:
    """The pieces one behind the other; plain neighbours become one run."""
    pieces = list(pieces)
    runs: list[Run] = []
    plain = 0
    for piece in pieces:
        if type(piece) is Typed:
            if plain:
                runs.append((plain, TEMPLATE, 0))
                plain = 0
            runs += piece._runs
        else:
            plain += len(piece)
    if plain:
        runs.append((plain, TEMPLATE, 0))
    return Typed("".join(pieces), tuple(runs))


def glue(pieces: Iterable[str]) -> str:
    """As `glue_typed`, but a plain string where every piece is one."""
    pieces = list(pieces)
    return glue_typed(pieces) if any(type(piece) is Typed for piece in pieces) else "".join(pieces)


def origins_in(value: Any) -> set[int]:
    """The leaves that a value is made of, however deep they stand in it."""
    if isinstance(value, Typed):
        return {origin for _, origin, _ in value._runs if origin > 0}
    if isinstance(value, dict):
        return {origin for pair in value.items() for part in pair for origin in origins_in(part)}
    if isinstance(value, (list, tuple)):
        return {origin for part in value for origin in origins_in(part)}
    return set()


def blur(text: str, *sources: Any) -> str:
    """`text` made from `sources` in a way that was not followed: it may all be typed by the first of their leaves.

    The other leaves are remembered as runs of no length, so that they do not count as dropped. Marks in the sources
    stay, at the start. A text made of plain strings alone is returned as it is.
    """
    origins = sorted(origins_in(sources))
    marks = tuple(run for source in sources if isinstance(source, Typed) for run in source._runs if run[1] < 0)
    if not origins and not marks:
        return text
    first = origins[0] if origins else TEMPLATE
    return Typed(
        str.__str__(text), (*marks, (len(text), first, BLURRED), *((0, origin, WHOLE) for origin in origins[1:]))
    )


def shown(value: Any) -> str:
    """What a template prints for a value: `str(value)`, with its origin."""
    if isinstance(value, str):
        return value
    text = str(value)
    return blur(text, value) if isinstance(value, (dict, list, tuple)) else text


_PERCENT = re.compile(r"%(?:%|s|\((\w+)\)s|(.))", re.DOTALL)


def format_percent(pattern: str, values: Any) -> str:
    """`pattern % values`; followed for `%s` and `%(name)s`, blurred for the rest.

    Raises:
        TypeError: As Python does, for too few or too many values.
    """
    expected = str.__mod__(str.__str__(pattern), values)
    queue = list(values) if isinstance(values, tuple) else [values]
    pieces: list[str] = []
    place = 0
    source = pattern if isinstance(pattern, Typed) else Typed(pattern, runs_of(pattern))
    for hole in _PERCENT.finditer(pattern):
        if hole[2]:
            return blur(expected, pattern, values)
        pieces.append(source[place : hole.start()])
        if hole[0] == "%%":
            pieces.append("%")
        else:
            pieces.append(shown(values[hole[1]]) if hole[1] else shown(queue.pop(0)))
        place = hole.end()
    pieces.append(source[place:])
    result = glue_typed(pieces)
    return result if result == expected else blur(expected, pattern, values)
