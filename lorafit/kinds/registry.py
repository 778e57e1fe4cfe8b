"""Registries of named kinds. Adding a kind is adding one file to the registry's folder; no list names it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

from lorafit.console.nearest import nearest
from lorafit.errors import RecipeError

T = TypeVar("T")


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
