"""The recipe's schema as a tree of slots: what may stand where. Built from the pydantic models, so it repeats nothing.

Section   model: fields by name            training: {...}
Choice    kinds by name, one default       optimizer: adamw | {kind: adamw, ...}
Items     a list of one slot               tracking: [...]
Variants  forms told apart by their keys   validation: {fraction: 0.1} | sources
Table     free names                       columns: {prompt: question}
Leaf      a value                          seed: 0
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Discriminator, Tag
from pydantic.fields import FieldInfo

from lorafit.kinds.section import PATH, PATH_OR_NAME
from lorafit.recipe.yaml_tree import Entry, KeyPath, Unreadable, find, mapping


@dataclass(frozen=True, slots=True)
class Leaf:
    """A value of one or several plain types.

    Attributes:
        forms: Each type with the limits on it, e.g. `(int, [Ge(1)])` and `(Literal["auto"], [])`.
    """

    forms: tuple[tuple[Any, tuple[Any, ...]], ...]
    nullable: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """A section; its fields are known to `fields_of`."""

    model: type[BaseModel]
    nullable: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """A field that names a kind, and the section that each kind brings."""

    kinds: Mapping[str, type[BaseModel]]
    default: str | None
    nullable: bool = False


@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    item: Slot
    limits: tuple[Any, ...] = ()
    nullable: bool = False


@dataclass(frozen=True, slots=True)
class Variants:
    """Several forms; `tag` says which one a value has."""

    forms: Mapping[str, Slot]
    tag: Any
    nullable: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping with free keys."""

    nullable: bool = False


Slot = Leaf | Group | Choice | Items | Variants | Table


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a section.

    Attributes:
        info: What pydantic knows about it, its default among that.
        is_path: Whether it holds a path.
        may_be_path: Whether it holds a path, a hub id or a shipped name.
    """

    name: str
    slot: Slot
    info: FieldInfo
    is_path: bool
    may_be_path: bool

    @property
    def required(self) -> bool:
        """Whether a recipe must say it."""
        return self.info.is_required()

    @property
    def default(self) -> Any:
        """What it is where a recipe says nothing, in the recipe's own words: `{}` for a section."""
        return self.info.get_default(call_default_factory=True, validated_data={})


@cache
def fields_of(model: type[BaseModel]) -> Mapping[str, Field]:
    """A section's fields by name, in the order of the schema; `kind` is no field of it but its name."""
    found = {}
    for name, info in model.model_fields.items():
        if name == "kind":
            continue
        slot = slot_of(info.annotation, (*info.metadata, info), info.default)
        mark = info.json_schema_extra
        found[name] = Field(name, slot, info, mark == PATH, mark == PATH_OR_NAME)
    return found


def slot_of(annotation: Any, metadata: tuple[Any, ...] = (), default: Any = None) -> Slot:
    """The slot that a field's annotation describes."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return slot_of(inner, (*more, *metadata), default)
    if get_origin(annotation) in (Union, types.UnionType):
        return _slot_of_union(annotation, metadata, default)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        name = _kind_name(annotation)
        return Choice({name: annotation}, name) if name else Group(annotation)
    if get_origin(annotation) is list:
        return Items(slot_of(get_args(annotation)[0]), _limits(metadata))
    if get_origin(annotation) is dict:
        return Table()
    return Leaf(((annotation, _limits(metadata)),))


def _slot_of_union(annotation: Any, metadata: tuple[Any, ...], default: Any) -> Slot:
    parts = [part for part in get_args(annotation) if part is not type(None)]
    nullable = len(parts) < len(get_args(annotation))
    if any(isinstance(m, FieldInfo) and m.discriminator == "kind" for m in metadata):
        kinds = {_kind_name(part): part for part in parts}
        return Choice(kinds, default if isinstance(default, str) else None, nullable)
    telling = next((m for m in metadata if isinstance(m, Discriminator)), None)
    if telling is not None:
        forms = {next(m.tag for m in get_args(part)[1:] if isinstance(m, Tag)): slot_of(part) for part in parts}
        return Variants(forms, telling.discriminator, nullable)
    if len(parts) == 1:
        inner = slot_of(parts[0], metadata, default)
        return replace(inner, nullable=nullable or inner.nullable)
    slots = [slot_of(part, metadata) for part in parts]
    forms_of_leaves = [
        form for slot in slots for form in (slot.forms if isinstance(slot, Leaf) else ((list[str], ()),))
    ]
    return Leaf(tuple(forms_of_leaves), nullable)


def _kind_name(model: type[BaseModel]) -> str:
    info = model.model_fields.get("kind")
    return get_args(info.annotation)[0] if info is not None and get_origin(info.annotation) is Literal else ""


def _limits(metadata: tuple[Any, ...]) -> tuple[Any, ...]:
    limits: list[Any] = []
    for item in metadata:
        limits.extend(item.metadata if isinstance(item, FieldInfo) else [item])
    return tuple(limit for number, limit in enumerate(limits) if limit not in limits[:number])


def plain(entry: Entry, slot: Slot | None = None) -> Any:
    """The values of a tree without their places, as the schema's types want them (YAML has no tuples).

    What could not be read is left out, a list with such an item whole.
    """
    if isinstance(entry.value, dict):
        readable = {key: below for key, below in entry.value.items() if _is_readable(below)}
        return {key: plain(below, slot_below(slot, entry, key)) for key, below in readable.items()}
    if isinstance(entry.value, tuple):
        items = [plain(item, slot_below(slot, entry, number)) for number, item in enumerate(entry.value)]
        return tuple(items) if isinstance(slot, Leaf) and _tuple_of(slot) is not None else items
    return entry.value


def _tuple_of(slot: Leaf) -> Any:
    return next((form for form, _ in slot.forms if get_origin(form) is tuple), None)


def _is_readable(entry: Entry) -> bool:
    if isinstance(entry.value, tuple):
        return all(_is_readable(item) for item in entry.value)
    return entry.value is not Unreadable.VALUE


def kind_of(choice: Choice, entry: Entry | None) -> str | None:
    """The kind that an entry names, by a bare word, by its `kind`, or by saying nothing; None where it names none."""
    value = entry.value if entry is not None else None
    if isinstance(value, dict):
        named = value.get("kind")
        value = named.value if named is not None else choice.default
    elif value is None:
        value = choice.default
    return value if isinstance(value, str) else None


def expand(slot: Slot | None, entry: Entry) -> Entry:
    """A short form in its long form: a bare kind as `{kind: word}`, a bare path as a list of one source."""
    if isinstance(slot, Choice) and isinstance(entry.value, str):
        return mapping({"kind": entry}, entry.place, entry.key_place)
    slot = variant_of(slot, entry)
    if isinstance(slot, Items) and isinstance(slot.item, Group):
        items = (
            entry.value if isinstance(entry.value, tuple) else (entry,) if isinstance(entry.value, str | dict) else None
        )
        if items is not None:
            long = tuple(
                mapping({"path": item}, item.place, item.key_place) if isinstance(item.value, str) else item
                for item in items
            )
            return Entry(long, entry.place, entry.key_place, 1 + sum(item.count for item in long))
    return entry


def variant_of(slot: Slot | None, entry: Entry | None) -> Slot | None:
    """The form of `Variants` that an entry has; every other slot as it is."""
    if not isinstance(slot, Variants) or entry is None:
        return slot
    return slot.forms[slot.tag(plain(entry))]


def fields_at(slot: Slot | None, entry: Entry | None) -> Mapping[str, Field] | None:
    """The fields that may stand in an entry; None where it is no section, or of no known kind."""
    slot = variant_of(slot, entry)
    if isinstance(slot, Group):
        return fields_of(slot.model)
    if isinstance(slot, Choice):
        model = slot.kinds.get(kind_of(slot, entry) or "")
        return fields_of(model) if model is not None else None
    return None


def slot_below(slot: Slot | None, entry: Entry | None, part: str | int) -> Slot | None:
    """The slot of one key or list item of an entry; None where the schema knows none."""
    slot = variant_of(slot, entry)
    if isinstance(slot, Items):
        return slot.item if isinstance(part, int) else None
    if isinstance(slot, Leaf):
        types_of_items = get_args(_tuple_of(slot))
        return slot_of(types_of_items[part]) if isinstance(part, int) and part < len(types_of_items) else None
    fields = fields_at(slot, entry)
    return fields[part].slot if fields is not None and isinstance(part, str) and part in fields else None


def slot_at(path: KeyPath, tree: Entry) -> Slot | None:
    """The slot of a recipe's key; None where the schema knows none."""
    slot: Slot | None = recipe_outline()
    entry: Entry | None = tree
    for part in path:
        slot = slot_below(slot, entry, part)
        entry = find(entry, (part,)) if entry is not None else None
    return slot


def real_path(loc: Sequence[str | int], tree: Entry) -> tuple[KeyPath, Slot | None]:
    """The key that pydantic's `loc` means, and its slot: without the tags of unions and the names of types in it."""
    slot: Slot | None = recipe_outline()
    entry: Entry | None = tree
    path: list[str | int] = []
    parts = list(loc)
    while parts:
        if isinstance(slot, Variants) or (isinstance(slot, Choice) and len(slot.kinds) > 1):
            parts.pop(0)  # the tag
            if not parts:
                break
            if isinstance(slot, Variants):
                slot = variant_of(slot, entry) if entry is not None else None
        if isinstance(slot, Leaf) and not isinstance(parts[0], int):
            break  # the name of a type
        part = parts.pop(0)
        if isinstance(slot, Choice) and part == "kind":
            break  # the choice itself is wrong
        path.append(part)
        slot = slot_below(slot, entry, part)
        entry = find(entry, (part,)) if entry is not None else None
    return tuple(path), slot


def every_key(slot: Slot, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Slot]]:
    """Every key of the schema with its slot, of every kind and form; list items leave no trace in the path."""
    if path:
        yield path, slot
    if isinstance(slot, Items):
        yield from (pair for pair in every_key(slot.item, path) if pair[0] != path)
    elif isinstance(slot, Variants):
        for form in slot.forms.values():
            yield from (pair for pair in every_key(form, path) if pair[0] != path)
    else:
        models = (
            [slot.model] if isinstance(slot, Group) else list(slot.kinds.values()) if isinstance(slot, Choice) else []
        )
        for model in models:
            for name, below in fields_of(model).items():
                yield from every_key(below.slot, (*path, name))


@cache
def recipe_outline() -> Group:
    """The whole recipe's slot."""
    from lorafit.recipe.schema import Recipe

    return Group(Recipe)
