"""The recipe as JSON Schema, for editors that complete keys and mark errors."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic import BaseModel

from lorafit.recipe.docstrings import field_docs, first_paragraph
from lorafit.recipe.expect import listed_names
from lorafit.recipe.extends import preset_names
from lorafit.recipe.schema_tree import Choice, Field, Group, Leaf, Slot, Table, Variants, fields_of, recipe_outline

EXTENDS = "A shipped preset, or the path of another recipe: what this file does not say is taken from there."
_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
_LIMITS = {
    annotated_types.Ge: ("ge", "minimum"),
    annotated_types.Gt: ("gt", "exclusiveMinimum"),
    annotated_types.Le: ("le", "maximum"),
    annotated_types.Lt: ("lt", "exclusiveMaximum"),
    annotated_types.MinLen: ("min_length", "minItems"),
}


def json_schema() -> dict[str, Any]:
    """The recipe as JSON Schema, draft 2020-12, with its short forms (bare kinds, bare paths) and `extends`."""
    definitions: dict[str, Any] = {}
    schema = _schema_of_section(recipe_outline().model, definitions, required=False)
    presets = {"anyOf": [{"enum": preset_names()}, {"type": "string", "pattern": r"(/|\.ya?ml$)"}]}
    schema["properties"] = {"extends": {**presets, "description": EXTENDS}, **schema["properties"]}
    needed = [name for name, field in fields_of(recipe_outline().model).items() if field.required]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lorafit recipe",
        **schema,
        "anyOf": [{"required": ["extends"]}, {"required": needed}],
        "$defs": dict(sorted(definitions.items())),
    }


def _schema_of_section(model: type[BaseModel], definitions: dict[str, Any], *, required: bool = True) -> dict[str, Any]:
    docs, properties = field_docs(model), {}
    for name, field in fields_of(model).items():
        properties[name] = {**_schema_of(field.slot, definitions), "description": docs.get(name, "")}
        if not field.required:
            properties[name]["default"] = _json_default(field)
    needed = [name for name, field in fields_of(model).items() if field.required]
    schema = {"type": "object", "description": first_paragraph(model.__doc__), "properties": properties}
    if required and needed:
        schema["required"] = needed
    return {**schema, "additionalProperties": False}


def _schema_of(slot: Slot, definitions: dict[str, Any]) -> dict[str, Any]:
    forms = _forms_of(slot, definitions)
    if slot.nullable:
        forms.append({"type": "null"})
    return forms[0] if len(forms) == 1 else {"anyOf": forms}


def _forms_of(slot: Slot, definitions: dict[str, Any]) -> list[dict[str, Any]]:
    if isinstance(slot, Leaf):
        return [_schema_of_form(form, limits) for form, limits in slot.forms]
    if isinstance(slot, Group):
        return [_reference(slot.model, definitions, _schema_of_section(slot.model, definitions, required=False))]
    if isinstance(slot, Choice):
        forms: list[dict[str, Any]] = [{"enum": list(slot.kinds)}]
        for kind, model in slot.kinds.items():
            section = _schema_of_section(model, definitions)
            section["properties"] = {"kind": {"const": kind}, **section["properties"]}
            if kind != slot.default:
                section["required"] = ["kind", *section.get("required", [])]
            forms.append(_reference(model, definitions, section))
        return forms
    if isinstance(slot, Variants):
        return [form for below in slot.forms.values() for form in _forms_of(below, definitions)]
    if isinstance(slot, Table):
        return [{"type": "object", "additionalProperties": {"type": "string"}}]
    if isinstance(slot.item, Group):
        source = _reference(slot.item.model, definitions, _schema_of_section(slot.item.model, definitions))
        return [
            {"type": "string"},
            source,
            {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, source]}},
        ]
    return [{"type": "array", "items": _schema_of(slot.item, definitions), **_json_limits(slot.limits)}]


def _reference(model: type[BaseModel], definitions: dict[str, Any], section: dict[str, Any]) -> dict[str, Any]:
    definitions[model.__name__] = section
    return {"$ref": f"#/$defs/{model.__name__}"}


def _schema_of_form(form: Any, limits: tuple[Any, ...]) -> dict[str, Any]:
    if get_origin(form) is Literal:
        return {"enum": list(get_args(form))}
    if get_origin(form) is list:
        return {"type": "array", "items": {"type": _JSON_TYPES[get_args(form)[0]]}}
    if get_origin(form) is tuple:
        items = [_schema_of_form(get_args(part)[0], tuple(get_args(part)[1].metadata)) for part in get_args(form)]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    names = listed_names(limits)
    if names is not None:
        return {"enum": names}
    return {"type": _JSON_TYPES[form], **_json_limits(limits)}


def _json_limits(limits: tuple[Any, ...]) -> dict[str, Any]:
    found = {}
    for limit in limits:
        for kind, (attribute, word) in _LIMITS.items():
            if isinstance(limit, kind):
                found[word] = getattr(limit, attribute)
        if getattr(limit, "min_length", None) and not isinstance(limit, annotated_types.MinLen):
            found["minLength"] = limit.min_length
    return found


def _json_default(field: Field) -> Any:
    return list(field.default) if isinstance(field.default, tuple) else field.default
