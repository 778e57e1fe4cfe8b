"""The recipe as JSON Schema, for editors that complete keys and mark errors: pydantic's, with the docstrings in it."""

from __future__ import annotations

from collections.abc import Iterator

from lorafit.kinds.section import Section
from lorafit.recipe.docstrings import field_docs, first_paragraph
from lorafit.recipe.extends import preset_names
from lorafit.recipe.schema_tree import Node, rebuilt

EXTENDS = "A shipped preset, or the path of another recipe: what this file does not say is taken from there."


def described_schema() -> Node:
    """pydantic's JSON Schema of the recipe with a description of every section and key, and no titles."""
    from lorafit.recipe.schema import Recipe

    schema = rebuilt(Recipe.model_json_schema(), _tidied)
    models = {model.__name__: model for model in _sections(Section)}
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        section["description"] = first_paragraph(models[name].__doc__)
        for key, text in field_docs(models[name]).items():
            section["properties"][key] |= {"description": text} if key != "kind" else {}
    return schema


def json_schema() -> Node:
    """The recipe as JSON Schema, draft 2020-12, with its short forms (bare kinds, bare paths) and `extends`."""
    schema = rebuilt(described_schema(), lambda node: {word: held for word, held in node.items() if word != "format"})
    definitions, needed = schema.pop("$defs"), schema.pop("required")
    for field in schema["properties"].values():
        if "$ref" in field:  # what it needs may stand in what the recipe extends
            definitions[field["$ref"].rpartition("/")[2]].pop("required", None)
    presets = {"anyOf": [{"enum": preset_names()}, {"type": "string", "pattern": r"(/|\.ya?ml$)"}]}
    schema["properties"] = {"extends": {**presets, "description": EXTENDS}, **schema["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lorafit recipe",
        **schema,
        "anyOf": [{"required": ["extends"]}, {"required": needed}],
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
