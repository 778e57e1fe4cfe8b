"""Registries of named kinds. Adding a kind is adding one file to the registry's folder; no list names it."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from lorafit.errors import RecipeError

T = TypeVar("T")


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names in `known` that look most like `name`, best first; empty where nothing looks alike."""
    by_folded = {k.lower().replace("-", "_"): k for k in known}
    folded = name.lower().replace("-", "_")
    found = difflib.get_close_matches(folded, list(by_folded), n=len(by_folded) or 1, cutoff=0.6)
    return [by_folded[f] for f in found if _is_close(folded, f)][:count]


def _is_close(name: str, known: str) -> bool:
    """Whether a name may well be a slip for a known one: one holds the other, or few letters differ for their length.

    Shared letters alone say little of short words: `bias` and `base` have three of four.
    """
    shorter = min(len(name), len(known))
    return (shorter > 2 and (name in known or known in name)) or _edits(name, known) <= max(1, shorter // 3)


def _edits(one: str, other: str) -> int:
    """Letters to add, take away, change or swap with their neighbour until one word is the other."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, above, row = row, before, [i]
        for j, wanted in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                cost = min(cost, above[j - 2] + 1)
            row.append(cost)
    return row[-1]


class Registry(Generic[T]):
    """Kinds by name, found by importing every module of one package the first time anything is asked for.

    Args:
        what: What its members are called in messages, e.g. `optimizer`.
        package: The package whose modules register members, e.g. `lorafit.kinds.optimizers`.
    """

    def __init__(self, what: str, package: str) -> None:
        self.what = what
        self._package = package
        self._members: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: makes one instance of the class the member called `name`."""

        def add(cls: type[T]) -> type[T]:
            if name in self._members and type(self._members[name]).__qualname__ != cls.__qualname__:
                raise ValueError(f"two {self.what} kinds are called {name!r}")
            self._members[name] = cls()
            return cls

        return add

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            package = importlib.import_module(self._package)
            for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
                importlib.import_module(f"{self._package}.{module}")

    def get(self, name: str) -> T:
        """The member called `name`.

        Raises:
            RecipeError: Unknown name; the message lists the nearest names and all of them.
        """
        self._load()
        if name not in self._members:
            close = nearest(name, self._members)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise RecipeError(f"unknown {self.what} '{name}'", todo=f"{hint}available: {', '.join(self.names())}")
        return self._members[name]

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        self._load()
        return sorted(self._members)

    def items(self) -> list[tuple[str, T]]:
        """Every name with its member, sorted by name."""
        self._load()
        return sorted(self._members.items())
