"""What to write instead of a value that a key does not take. What is advised is tried on the recipe first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from lorafit.recipe.expect import form_names, listed_names
from lorafit.recipe.schema_tree import (
    Group,
    Items,
    Leaf,
    Slot,
    Variants,
    fields_at,
    plain,
    real_path,
    recipe_outline,
    slot_at,
)
from lorafit.recipe.words import means_nothing, suggest_word
from lorafit.recipe.yaml_tree import Entry, KeyPath, entry_of, find, nearest_entry, shown, with_entry

_SHOWN_WORD_CHARACTERS = 40
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?")
_COMMA_NUMBER = re.compile(r"[-+]?\d+,\d+")


def mend(path: KeyPath, slot: Slot | None, value: Any, tree: Entry) -> str:
    """What to do about a value of the wrong type; empty where nothing better can be said than what is expected.

    Args:
        path: The key.
        slot: What the schema has there.
        value: What was written.
        tree: The recipe as it was written.
    """
    if (value is False or means_nothing(value)) and (nothing := _say_nothing(path, tree)):
        return nothing
    if isinstance(slot, Group) and (section := _as_section(path, slot, value, tree)):
        return section
    return _mend_text(path, slot, value, tree) if isinstance(value, str) else _mend_other(slot, value)


def takes(tree: Entry, path: KeyPath, value: Any) -> bool:
    """Whether the recipe would have no error at `path` or below it with that value there."""
    from lorafit.recipe.schema import Recipe

    if find(tree, path) is None:
        return False
    tried = with_entry(tree, path, entry_of(value, nearest_entry(tree, path).place))
    try:
        Recipe.model_validate(plain(tried, recipe_outline()), strict=True)
    except ValidationError as error:
        wrong = (real_path(one["loc"], tried)[0] for one in error.errors(include_url=False))
        return not any(found[: len(path)] == path for found in wrong)
    return True


def _say_nothing(path: KeyPath, tree: Entry) -> str:
    """How a key, or the list that an item stands in, says none: `[]`, null, or by not being there."""
    if isinstance(path[-1], int):
        path = path[:-1]
    forms: tuple[tuple[str, Any], ...] = (("[]", []), ("null", None))
    empty = next((form for form in forms if takes(tree, path, form[1])), None)
    if empty is None:
        return ""
    field = (fields_at(slot_at(path[:-1], tree), find(tree, path[:-1])) or {}).get(str(path[-1]))
    is_default = field is not None and not field.required and field.default == empty[1]
    return f"leave it out, or write {empty[0]}" if is_default else f"write {empty[0]}"


def _as_section(path: KeyPath, slot: Group, value: Any, tree: Entry) -> str:
    """The section in which a word or number was meant, by the first of its keys that takes it; empty for none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    key = next((name for name in slot.model.model_fields if takes(tree, path, {name: value})), None)
    return f"write {path[-1]}: {{{key}: {value}}}" if key is not None else ""


def _mend_other(slot: Slot | None, value: Any) -> str:
    """What to do about a number, a boolean or nothing where it does not belong."""
    if value is None:
        return "fill it in, or remove the key" if not isinstance(slot, Leaf | Variants | None) else ""
    if not isinstance(value, int | float):
        return ""
    if isinstance(slot, Leaf) and any(form is str for form, _ in slot.forms):
        return "quote it"
    if isinstance(slot, Variants):
        groups = (form for form in slot.forms.values() if isinstance(form, Group))
        return next((f"write {{{next(iter(group.model.model_fields))}: {shown(value)}}}" for group in groups), "")
    return f"write {int(value)}" if isinstance(value, float) and value.is_integer() else ""


def _mend_text(path: KeyPath, slot: Slot | None, value: str, tree: Entry) -> str:
    """What to do about text where none belongs."""
    types = [form for form, _ in slot.forms] if isinstance(slot, Leaf) else []
    if bool in types and value.lower() in ("true", "false"):
        return "remove the quotes"
    words = [str(word) for form in types for word in get_args(form) if isinstance(word, str)]
    if words and (suggestion := suggest_word(value, words)):
        return suggestion.rstrip()
    if isinstance(slot, Items) or any(get_origin(form) is list for form in types):
        return _mend_list(path, slot, value, tree)
    if int in types or float in types:
        if _NUMBER.fullmatch(value.strip()):
            return "remove the quotes"
        if _COMMA_NUMBER.fullmatch(value.strip()):
            return f"write {value.strip().replace(',', '.')}"
    return ""


def _mend_list(path: KeyPath, slot: Slot | None, value: str, tree: Entry) -> str:
    """The list that a text was meant to be, `a, b` or `a b` as well, if the key takes it; else names like it."""
    names = [name for name in re.split(r"[\s,;]+", value.strip(" []")) if name]
    if names and not means_nothing(value) and takes(tree, path, names):
        return f"write [{', '.join(names)[:_SHOWN_WORD_CHARACTERS]}]"
    known = _names_of_items(slot)
    close = [suggest_word(name, known).removeprefix("did you mean ").partition("?")[0] for name in names]
    meant = [word.split(" or ")[0] for word in close if word]
    return f"did you mean [{', '.join(meant)}]?" if meant and len(meant) == len(names) else ""


def _names_of_items(slot: Slot | None) -> Sequence[str]:
    if not isinstance(slot, Items) or not isinstance(slot.item, Leaf):
        return ()
    form, limits = slot.item.forms[0]
    return (listed_names(limits) or ()) if form is str or get_args(form) == () else form_names(form)
