"""Writes what the recipe's schema says: the tables of docs/recipe.md below its marker, and configs/recipe.schema.json.

`make docs` runs it; by hand: python docs/write_reference.py
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pydantic import BaseModel

from lorafit.kinds.section import Section
from lorafit.recipe.explain import allowed_range, expectation
from lorafit.recipe.extends import preset_names
from lorafit.recipe.schema import Recipe
from lorafit.recipe.schema_tree import (
    Node,
    forms,
    is_nullable,
    kind_of,
    kinds_of,
    rebuilt,
    section_of,
    sections_in,
    without_references,
)
from lorafit.recipe.yaml_tree import KeyPath, key_text

PAGE = Path(__file__).parent / "recipe.md"
SCHEMA = Path(__file__).parents[1] / "configs" / "recipe.schema.json"
BEGIN = "<!-- below: generated from the schema -->"
EXTENDS = "A shipped preset, or the path of another recipe: what this file does not say is taken from there."


def described_schema() -> Node:
    """pydantic's JSON Schema of the recipe with a description of every section and key, and no titles."""
    schema = rebuilt(Recipe.model_json_schema(), _tidied)
    models = {model.__name__: model for model in _sections(Section)}
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        section["description"] = first_paragraph(models[name].__doc__)
        for key, text in field_docs(models[name]).items():
            section["properties"][key] |= {"description": text} if key != "kind" else {}
    return schema


def json_schema() -> Node:
    """The recipe as JSON Schema, draft 2020-12, with its short forms (bare kinds, bare paths) and `extends`."""
    schema = described_schema()
    definitions, needed = schema.pop("$defs"), {"required": schema.pop("required"), "properties": {}}
    for name, field in schema["properties"].items():
        section = definitions.get(field.get("$ref", "").rpartition("/")[2], {})
        if "required" in section:  # only of a recipe that extends nothing: else it may stand there
            needed["properties"][name] = {"required": section.pop("required")}
    presets = {"anyOf": [{"enum": preset_names()}, {"type": "string", "pattern": r"(/|\.ya?ml$)"}]}
    schema["properties"] = {"extends": {**presets, "description": EXTENDS}, **schema["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lorafit recipe",
        **schema,
        "anyOf": [{"required": ["extends"]}, needed],
        "$defs": dict(sorted(definitions.items())),
    }


def _sections(model: type[Section]) -> Iterator[type[Section]]:
    for below in model.__subclasses__():
        yield below
        yield from _sections(below)


def _tidied(node: Node) -> Node:
    """A part without what repeats its key or its neighbours."""
    found = {word: held for word, held in node.items() if word not in ("title", "discriminator")}
    if "const" in found or "enum" in found:
        found.pop("type", None)
    if "kind" in found.get("properties", ()):
        found["properties"]["kind"].pop("default", None)
    parts = found.pop("oneOf", found.get("anyOf", []))
    return {**found, "anyOf": [form for part in parts for form in part.get("anyOf", [part])]} if parts else found


@cache
def _docs_in_module(file: str) -> dict[str, dict[str, str]]:
    """Field docstrings of a module, by class and field: the text under each annotated name."""
    found: dict[str, dict[str, str]] = {}
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found[node.name] = docs = {}
            for field, text in zip(node.body, node.body[1:], strict=False):
                is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                    docs[field.target.id] = " ".join(str(text.value.value).split())  # type: ignore[attr-defined]
    return found


def field_docs(model: type[BaseModel]) -> dict[str, str]:
    """The docstring of each field of a section, its bases' included."""
    docs: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if issubclass(cls, BaseModel) and cls is not BaseModel:
            docs |= _docs_in_module(inspect.getfile(cls)).get(cls.__name__, {})
    return docs


def first_paragraph(text: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((text or "").strip().split("\n\n")[0].split())


def page_with_tables(page: str) -> str:
    """The page's text with a table for each section of the present schema, and for each kind its own options."""
    tree = without_references(described_schema())
    inner = {name for name, node in tree["properties"].items() if kinds_of(node) or section_of(node)}
    top = {**tree, "properties": {name: node for name, node in tree["properties"].items() if name not in inner}}
    extends = f"\n| `extends` | text | | | {EXTENDS} |\n| `name`"
    head = page.partition(BEGIN)[0]
    parts = [f"{head}{BEGIN}\n", f"## The top level\n\n{_table(top)}".replace("\n| `name`", extends)]
    for name in tree["properties"]:
        parts += _pages((name,), tree["properties"][name]) if name in inner else []
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _pages(path: KeyPath, node: Node) -> Iterator[str]:
    """The heading and table of a section or kind, and those of the sections in it."""
    lists = [section for form in forms(node) for section in sections_in(form)]
    sources = [section for section in lists if "path" in section["properties"]]
    if kinds_of(node):
        yield _choice_page(path, node)
        fields = [item for section in kinds_of(node).values() for item in section["properties"].items()]
        yield from dict.fromkeys(page for name, field in fields for page in _pages((*path, name), field))
    elif path == ("data", "train"):
        yield _section_page(path, sources[0], " (each source)")
    else:
        note = f" (or sources, as in {key_text(('data', 'train'))}, without repeats)" if sources else ""
        yield from (_section_page(path, section, " (each of them)") for section in lists if section not in sources)
        for section in forms(node):
            if "properties" in section and section not in sources:
                yield _section_page(path, section, note)
                for name, field in section["properties"].items():
                    yield from _pages((*path, name), field)


def _heading(path: KeyPath) -> str:
    return f"{'##' if len(path) == 1 else '###'} {key_text(path)}"


def _section_page(path: KeyPath, section: Node, note: str = "") -> str:
    return f"{_heading(path)}{note}\n\n{section['description']}\n\n{_table(section)}"


def _choice_page(path: KeyPath, node: Node) -> str:
    kinds = ", ".join(f"`{kind}`" for kind in kinds_of(node))
    parts = [f"{_heading(path)}\n\nOne of {kinds}; default `{kind_of(node, None)}`.\n"]
    by_table: dict[str, list[str]] = {}
    for kind, section in kinds_of(node).items():
        table = _table(section) if set(section["properties"]) > {"kind"} else "No options of its own.\n"
        by_table.setdefault(table, []).append(f"- **`{kind}`**: {section['description']}")
    for table, lines in by_table.items():
        parts += ["\n".join(lines) + "\n", table]
    return "\n".join(parts)


def _table(section: Node) -> str:
    rows = ["| key | type | default | range | meaning |", "|---|---|---|---|---|"]
    for name, field in section["properties"].items():
        if name != "kind":
            default = "**required**" if name in section.get("required", ()) else _default_words(field)
            cells = (_type_words(field), default, allowed_range(field), field["description"])
            rows.append(f"| `{name}` | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _type_words(node: Node) -> str:
    if kinds_of(node):
        return "a kind"
    if section_of(node):
        return "a section or null" if is_nullable(node) else "a section"
    is_share = any("fraction" in form.get("properties", ()) for form in forms(node))
    return "a share, or sources, or null" if is_share else expectation(node)


def _default_words(node: Node) -> str:
    default = node["default"]
    if section_of(node) and default is not None:
        return "see below"
    if isinstance(default, float):
        return f"`{default:g}`"
    if default is None or isinstance(default, bool):
        return f"`{json.dumps(default)}`"
    if isinstance(default, list):
        return f"`[{', '.join(str(item) for item in default)}]`"
    return f"`{default}`" if default not in ("", {}) else "empty"


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(json_schema(), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
