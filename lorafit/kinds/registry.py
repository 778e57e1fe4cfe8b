"""Registries of named kinds. Adding a kind is adding one file to the registry's folder; no list names it.

formats.get("alpaca")               a kind without a recipe section: one instance a name
optimizers.bind(recipe.optimizer)   a kind with one: the class that was registered for it, the section inside
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar, Union

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler

from lorafit.console.nearest import did_you_mean
from lorafit.contracts import JsonObject, JsonValue
from lorafit.errors import RecipeError
from lorafit.kinds.section import KindSection

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic_core import CoreSchema

T = TypeVar("T")
S_co = TypeVar("S_co", bound=KindSection, covariant=True)


class Kind(ABC, Generic[S_co]):
    """A registered way to do something, with the recipe section that sets its options inside."""

    def __init__(self, section: S_co) -> None:
        self._section = section

    @property
    def section(self) -> S_co:
        """The recipe's options."""
        return self._section


K = TypeVar("K", bound=Kind[KindSection])


def as_bare_word(section: KindSection, dump: SerializerFunctionWrapHandler) -> object:
    """A section without options as the name of its kind, as recipes had it before the family had any options."""
    values = dump(section)
    return section.kind if values == {"kind": section.kind} else values


class _Members(Generic[T]):
    """Values by name, found by importing every module of one package the first time anything is asked for."""

    def __init__(self, what: str, package: str) -> None:
        self.what = what
        self._package = package
        self._members: dict[str, T] = {}
        self._class_names: dict[str, str] = {}
        self._loaded = False

    def _add(self, name: str, member: T, class_name: str) -> None:
        if self._class_names.setdefault(name, class_name) != class_name:  # a module may be imported twice
            raise ValueError(f"two {self.what} kinds are called {name!r}")
        self._members[name] = member

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
            hint = did_you_mean(name, self._members, count=3)
            raise RecipeError(f"unknown {self.what} '{name}'", todo=f"{hint}available: {', '.join(self.names())}")
        return self._members[name]

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        self._load()
        return sorted(self._members)

    def items(self) -> list[tuple[str, T]]:
        """Every name with its member, sorted by name."""
        self._load()
        return sorted(self._members.items(), key=lambda item: item[0])


class Registry(_Members[T]):
    """Kinds without options of their own: `get` gives the one instance of a name.

    Args:
        what: What its members are called in messages, e.g. `metric`.
        package: The package whose modules register members, e.g. `lorafit.kinds.metrics`.
    """

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: makes one instance of the class the member called `name`."""

        def add(cls: type[T]) -> type[T]:
            self._add(name, cls(), cls.__qualname__)
            return cls

        return add


class SectionRegistry(_Members[type[K]], Generic[K]):
    """Kinds that bring a recipe section: `bind` gives the kind of a section, with the section inside.

    Args:
        what: What its members are called in messages, e.g. `optimizer`.
        package: The package whose modules register members, e.g. `lorafit.kinds.optimizers`.
    """

    def __init__(self, what: str, package: str) -> None:
        super().__init__(what, package)
        self._sections: dict[str, type[KindSection]] = {}

    def register(self, *sections: type[KindSection]) -> Callable[[type[K]], type[K]]:
        """Class decorator: makes the class the member that each section names by the default of its field `kind`."""

        def add(cls: type[K]) -> type[K]:
            for section in sections:
                name = section.model_fields["kind"].default
                self._add(name, cls, cls.__qualname__)
                self._sections[name] = section
            return cls

        return add

    def section(self, name: str) -> type[KindSection]:
        """The recipe section of the member called `name`. Raises RecipeError as `get`."""
        self.get(name)
        return self._sections[name]

    def make_section(self, name: str, **options: JsonValue) -> KindSection:
        """The section of the member called `name`: these options, every other at its default."""
        return self.section(name).model_validate(options)

    def make(self, name: str, **options: JsonValue) -> K:
        """The member called `name` with these options, every other at its default."""
        return self.bind(self.make_section(name, **options))

    def bind(self, section: KindSection) -> K:
        """The kind that a recipe's section names, with the section inside."""
        return self.get(section.kind)(section)

    def one_of(self, default: str | None = None) -> Any:
        """The annotated type of a field that names a kind: a union over the sections, told apart by `kind`.

        A bare word stands for the kind with its defaults: `optimizer: adamw` is `optimizer: {kind: adamw}`. A mapping
        that names no kind means `default`: `adapter: {r: 8}` is `adapter: {kind: lora, r: 8}`.
        """

        def with_kind(value: JsonValue) -> JsonValue:
            if isinstance(value, str):
                return {"kind": value}
            if isinstance(value, dict) and "kind" not in value and default is not None:
                return {"kind": default, **value}
            return value

        sections = tuple(self.section(name) for name in self.names())
        union = Annotated[Union[sections], Field(discriminator="kind")] if len(sections) > 1 else sections[0]  # noqa: UP007
        return Annotated[union, BeforeValidator(with_kind), _ChoiceOfKinds(default)]


@dataclass(frozen=True)
class _ChoiceOfKinds:
    """A choice of kinds in the JSON schema: a bare word, or a kind's section, which names it unless it is `default`."""

    default: str | None

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonObject:
        union = handler(schema)
        references = union.get("oneOf", [union])
        kinds = []
        for section in map(handler.resolve_ref_schema, references):
            kinds.append(section["properties"]["kind"]["const"])
            if kinds[-1] != self.default:
                section["required"] = ["kind", *section.get("required", [])]
        return {"anyOf": [{"enum": kinds}, *references]}
