"""What the schema expects at a key, in words: for error messages and for the reference."""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.recipe.schema import LARGEST_COUNT
from lorafit.recipe.schema_tree import Node, forms, is_nullable, kinds_of, sections_in, words

_NAMES = {"string": "text", "integer": "a whole number", "number": "a number"}
_FORMATS = {"path": "a path", "path-or-name": "a path or a name"}
_PLURALS = {"string": "names", "integer": "whole numbers", "number": "numbers"}
_LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
}


def expectation(node: Node) -> str:
    """What a node allows, in words: `a whole number or auto`, `one of drop, skip`, `a list of names among loss`."""
    kinds = kinds_of(node)
    short = [part for form in forms(node) if sections_in(form) for part in forms(form["items"])]  # of a list of one
    names = [name for form in forms(node) if form not in short for name in _form_names(form)]
    said = f"one of {', '.join(kinds)}, or a mapping with a kind" if kinds else _either(names)
    return f"{said} or null" if is_nullable(node) else said


def _either(names: Sequence[str]) -> str:
    """`a`, `a or b`, `one of a, b, c`."""
    return f"one of {', '.join(names)}" if len(names) > 2 else " or ".join(names)


def _form_names(form: Node) -> list[str]:
    """A form in words; a list of words is each of them."""
    kind = form.get("type")
    if kind == "boolean":
        return ["true", "false"]
    if kind == "object":
        keys = list(form.get("properties", ()))
        return [f"{{{keys[0]}: ...}}" if len(keys) == 1 else "a mapping"]
    if kind != "array":
        return words(form) or [_FORMATS.get(str(form.get("format")), _NAMES[str(kind)])]
    if sections_in(form):
        return ["a path, or a list of sources"]
    items = form.get("prefixItems", [form.get("items", {})])
    many = f"names among {', '.join(words(form))}" if words(form) else _PLURALS.get(items[0].get("type"), "values")
    return [f"a list of {len(items)} {many}" if "prefixItems" in form else f"a list of {many}"]


def allowed_range(node: Node | None, found: float = 0) -> str:
    """The limits on a number, e.g. `between 0 and 1`, `at least 1`; empty where there are none.

    Args:
        node: The schema of the number's key.
        found: The number. A limit that only keeps counters from overflowing is left out where it does not matter.
    """
    return next((said for form in forms(node) if (said := _range_words(form, found))), "")


def _range_words(form: Node, found: float) -> str:
    limits = {name: form[name] for name in _LIMITS if name in form}
    if limits.get("maximum") == LARGEST_COUNT and found <= LARGEST_COUNT:
        del limits["maximum"]
    said = {name: f"{limit:.0f}" if float(limit).is_integer() else f"{limit:g}" for name, limit in limits.items()}
    if {"minimum", "maximum"} <= set(said):
        return f"between {said['minimum']} and {said['maximum']}"
    return " and ".join(f"{_LIMITS[name]} {said[name]}" for name in said)
