"""What a slot of the recipe expects, in words: for error messages and for the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
from pydantic import AfterValidator, BaseModel

from lorafit.recipe.schema_tree import Choice, Group, Items, Leaf, Slot, Variants
from lorafit.recipe.words import LARGEST_COUNT, OneNameOf

_NAMES = {str: "text", int: "a whole number", float: "a number"}
_PLURALS = {str: "names", int: "whole numbers", float: "numbers"}


def expectation(slot: Slot | None) -> str:
    """What may stand in a slot, e.g. `a whole number or auto`, `one of error, skip`, `a list of texts`."""
    if isinstance(slot, Leaf):
        words = either([name for form, _ in slot.forms for name in form_names(form)])
    elif isinstance(slot, Choice):
        words = f"one of {', '.join(slot.kinds)}, or a mapping with a kind"
    elif isinstance(slot, Items):
        words = "a path, or a list of sources" if isinstance(slot.item, Group) else f"a list of {_plural(slot.item)}"
    elif isinstance(slot, Variants):
        words = " or ".join(expectation(form) for form in slot.forms.values())
    elif isinstance(slot, Group) and _is_one_value(slot.model):
        words = f"{{{next(iter(slot.model.model_fields))}: ...}}"
    else:
        words = "a mapping"
    return f"{words} or null" if slot is not None and slot.nullable else words


def _is_one_value(model: type[BaseModel]) -> bool:
    return len(model.model_fields) == 1


def form_names(form: Any) -> list[str]:
    """A type in words; a literal's are its values."""
    if form is bool:
        return ["true", "false"]
    if get_origin(form) is Literal:
        return [str(value) for value in get_args(form)]
    if get_origin(form) is tuple:
        parts = get_args(form)
        return [f"a list of {len(parts)} {_PLURALS.get(_bare(parts[0]), 'values')}"]
    if get_origin(form) is list:
        return [f"a list of {_PLURALS.get(_bare(get_args(form)[0]), 'values')}"]
    return [_NAMES.get(form, str(form))]


def _bare(form: Any) -> Any:
    return _bare(get_args(form)[0]) if get_origin(form) is Annotated else form


def _plural(slot: Slot) -> str:
    form, limits = slot.forms[0] if isinstance(slot, Leaf) else (None, ())
    names = form_names(form) if get_origin(form) is Literal else listed_names(limits)
    if names is not None:
        return f"names among {', '.join(names)}"
    return _PLURALS.get(slot.forms[0][0], "values") if isinstance(slot, Leaf) else "mappings"


def either(names: Sequence[str]) -> str:
    """`a`, `a or b`, `one of a, b, c`."""
    if len(names) > 2:
        return f"one of {', '.join(names)}"
    return " or ".join(names)


def listed_names(limits: Sequence[Any]) -> list[str] | None:
    """The names that a validator among `limits` lets through; None where anything goes."""
    validators = (limit.func for limit in limits if isinstance(limit, AfterValidator))
    return next((validator.names() for validator in validators if isinstance(validator, OneNameOf)), None)


def allowed_range(slot: Slot | None, found: float = 0) -> str:
    """The limits on a number, e.g. `between 0 and 1`, `at least 1`; empty where there are none.

    Args:
        slot: Where the number stands.
        found: The number. A limit that only keeps counters from overflowing is left out where it does not matter.
    """
    if not isinstance(slot, Leaf):
        return ""
    for _, limits in slot.forms:
        words = _range_words([one for one in limits if getattr(one, "le", 0) != LARGEST_COUNT or found > LARGEST_COUNT])
        if words:
            return words
    return ""


def _range_words(limits: Sequence[Any]) -> str:
    at_least = _limit(limits, annotated_types.Ge, "ge")
    above = _limit(limits, annotated_types.Gt, "gt")
    at_most = _limit(limits, annotated_types.Le, "le")
    below = _limit(limits, annotated_types.Lt, "lt")
    if at_least is not None and at_most is not None:
        return f"between {_number(at_least)} and {_number(at_most)}"
    low = (
        f"at least {_number(at_least)}"
        if at_least is not None
        else f"more than {_number(above)}"
        if above is not None
        else ""
    )
    high = (
        f"at most {_number(at_most)}"
        if at_most is not None
        else f"less than {_number(below)}"
        if below is not None
        else ""
    )
    return " and ".join(part for part in (low, high) if part)


def _limit(limits: Sequence[Any], kind: type, name: str) -> float | None:
    return next((getattr(limit, name) for limit in limits if isinstance(limit, kind)), None)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{int(value)}" if float(value).is_integer() else f"{value:g}"
