"""The recipe's JSON Schema as a tree: what may stand where. It is generated from the models, so it repeats nothing.

    properties            a section               training: {...}
    forms with a `kind`   a choice of kinds       optimizer: adamw | {kind: adamw, ...}
    items                 a list                  tracking: [...]
    anyOf                 forms side by side      validation: {fraction: 0.1} | sources

Every reference is replaced by what it names, so a section that is used twice is one object in two places.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lorafit.contracts import JsonObject
from lorafit.machine.shipped import shipped
from lorafit.recipe.schema import Recipe
from lorafit.recipe.yaml_tree import Entry, KeyPath, find, plain

Node = JsonObject
"""A JSON Schema, or a part of one: what may stand at a key."""


def validate(tree: Entry) -> Recipe | list[ErrorDetails]:
    """The recipe that a tree's values are, or what pydantic finds wrong with them."""
    try:
        return Recipe.model_validate(plain(tree), strict=True)
    except ValidationError as error:
        return error.errors(include_url=False)


@cache
def recipe_tree() -> Node:
    """The tree of the whole recipe. Read from the generated file: for pydantic to write it anew takes 60 ms."""
    schema: Node = json.loads(shipped("recipe.schema.json").read_text(encoding="utf-8"))
    del schema["properties"]["extends"]
    _, complete = schema.pop("anyOf")  # what a recipe needs that extends no other
    tree = without_references({**schema, "required": complete["required"]})
    for name, needs in complete["properties"].items():
        tree["properties"][name]["anyOf"][0]["required"] = needs["required"]
    return tree


def without_references(schema: Node) -> Node:
    """A JSON Schema as a tree: every `$ref` is replaced by what it names, and a choice inside a choice is flattened."""
    sections: dict[str, Node] = {}

    def change(node: Node) -> Node:
        parts = node.pop("oneOf", node.pop("anyOf", []))
        if "$ref" in node:
            name = node.pop("$ref").rpartition("/")[2]
            if name not in sections:
                sections[name] = rebuilt(schema["$defs"][name], change)
            if not node:
                return sections[name]
            parts = [sections[name]]  # beside what is said of the key, its default among that
        flat = [form for part in parts for form in part.get("anyOf", [part])]
        return {**node, "anyOf": flat} if flat else node

    return rebuilt({key: held for key, held in schema.items() if key != "$defs"}, change)


def rebuilt(node: Node, change: Callable[[Node], Node]) -> Node:
    """A JSON Schema with `change` made to each of its parts, inner ones first."""
    found = dict(node)
    for word, held in node.items():
        if word in ("anyOf", "oneOf", "prefixItems"):
            found[word] = [rebuilt(part, change) for part in held]
        elif word in ("properties", "$defs"):
            found[word] = {name: rebuilt(part, change) for name, part in held.items()}
        elif word == "items":
            found[word] = rebuilt(held, change)
    return change(found)


def forms(node: Node | None) -> list[Node]:
    """The forms that a node allows, null apart."""
    found: list[Node] = (node or {}).get("anyOf", [node] if node else [])
    return [form for form in found if form.get("type") != "null"]


def is_nullable(node: Node) -> bool:
    """Whether a node allows null."""
    return {"type": "null"} in node.get("anyOf", ())


def words(node: Node) -> list[str]:
    """The words that a node lists, those that a list may hold included; empty where any text will do."""
    found: list[str] = []
    for form in forms(node):
        found += form.get("enum", [form["const"]] if "const" in form else [])
        found += words(form["items"]) if "items" in form else []
    return [word for word in found if isinstance(word, str)]


def kinds_of(node: Node | None) -> dict[str, Node]:
    """The section of each kind that a node allows; empty where it is no choice of kinds."""
    sections = [form for form in forms(node) if "kind" in form.get("properties", ())]
    return {section["properties"]["kind"]["const"]: section for section in sections}


def kind_of(node: Node | None, entry: Entry | None) -> str | None:
    """The kind that an entry names, by a bare word, by its `kind`, or by saying nothing; None where it names none."""
    named = entry.entries.get("kind") if entry is not None and isinstance(entry.value, dict) else entry
    if named is None or named.value is None:
        return next((kind for kind, form in kinds_of(node).items() if "kind" not in form.get("required", ())), None)
    return named.value if isinstance(named.value, str) else None


def section_of(node: Node | None) -> Node | None:
    """The section that a node is; None where it allows another form too."""
    only = forms(node)
    return only[0] if len(only) == 1 and only[0].get("properties") and not kinds_of(node) else None


def sections_in(form: Node) -> list[Node]:
    """The sections that a list's items may be; empty for every other form."""
    return [item for item in forms(form.get("items")) if "properties" in item]


def form_of(node: Node | None, entry: Entry | None) -> Node | None:
    """The form of a node that an entry has, or for None its section; None where the schema knows none."""
    kinds = kinds_of(node)
    if kinds:  # of one kind alone, pydantic judges what another kind's section holds by it
        return kinds.get(kind_of(node, entry) or "", next(iter(kinds.values())) if len(kinds) == 1 else None)
    if entry is not None and not isinstance(entry.value, dict):
        wanted = "array" if isinstance(entry.value, tuple) else None
        return next((form for form in forms(node) if wanted in (None, form.get("type"))), None)
    sections = [form for form in forms(node) if form.get("type") == "object"]
    held = entry.entries if entry is not None else {}
    return next((one for one in sections if set(one.get("required", ())) <= set(held)), next(iter(sections), None))


def fields_of(node: Node | None, entry: Entry | None = None) -> dict[str, Node]:
    """The keys that a node allows in an entry, with their nodes; empty where it is no section, or of no known kind."""
    properties = (form_of(node, entry) or {}).get("properties", {})
    return {name: field for name, field in properties.items() if name != "kind"}


def node_below(node: Node | None, entry: Entry | None, part: str | int) -> Node | None:
    """The node of one key or list item of an entry; None where the schema has none."""
    if isinstance(part, str):
        named: Node | None = fields_of(node, entry).get(part)
        of_any_name = (form_of(node, entry) or {}).get("additionalProperties")
        return named or (of_any_name if isinstance(of_any_name, dict) else None)
    form = next((form for form in forms(node) if form.get("type") == "array"), {})
    items: list[Node] = form.get("prefixItems", [])
    return items[part] if part < len(items) else form.get("items")


def node_at(path: KeyPath, tree: Entry) -> Node | None:
    """The node of a recipe's key; None where the schema has none."""
    node: Node | None = recipe_tree()
    entry: Entry | None = tree
    for part in path:
        node, entry = node_below(node, entry, part), find(entry, (part,))
    return node


def expand(node: Node | None, entry: Entry) -> Entry:
    """A short form in its long form: a bare kind as `{kind: word}`, a bare path as a list of one source."""
    if isinstance(entry.value, str) and kinds_of(node):
        return replace(entry, value={"kind": entry})
    section = next((section for form in forms(node) for section in sections_in(form)), None)
    is_one = isinstance(entry.value, str) or (isinstance(entry.value, dict) and form_of(node, entry) is section)
    if section is None or not (is_one or isinstance(entry.value, tuple)):
        return entry
    key = section["required"][0]
    items = entry.value if isinstance(entry.value, tuple) else (entry,)
    long = (Entry({key: item}, item.place, item.key_place) if isinstance(item.value, str) else item for item in items)
    return replace(entry, value=tuple(long))


def written_path(loc: Sequence[str | int], tree: Entry, *, is_missing: bool) -> KeyPath:
    """The key that pydantic's `loc` means: without tags of unions, names of types and what short forms leave out.

    Args:
        loc: Where pydantic found an error in the values of `tree`.
        tree: The recipe as it was written.
        is_missing: Whether the error is that the last part of it is not there.
    """
    path: KeyPath = ()
    entry: Entry | None = tree
    for number, part in enumerate(loc, 1):
        below = find(entry, (part,))
        if below is not None:
            path, entry = (*path, part), below
        elif is_missing and number == len(loc):
            path = (*path, part)
    return path


def every_key(node: Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Node]]:
    """Every key of the schema with its node, of every kind and form; list items leave no trace in the path."""
    for form in forms(node):
        for name, field in form.get("properties", {}).items():
            if name != "kind":
                yield (*path, name), field
                yield from every_key(field, (*path, name))
        yield from every_key(form["items"], path) if "items" in form else ()
