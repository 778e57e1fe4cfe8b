"""Every leaf of the recipe's schema by name, and what it takes to show that a leaf is no dead option.

    training.max_steps                   a value
    training.optimizer                   which kind
    training.optimizer(adamw).eps        an option of one kind
    data.train[].path                    a field of a list's items

A leaf is alive where two values of it lead to two outcomes: numbers, tensors, labels, files or errors that somebody
else than the recipe's own text, digest or plan shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, get_args

from lorafit.errors import LorafitError
from lorafit.recipe.schema_tree import Choice, Group, Items, Leaf, Slot, Variants, fields_of

Probe = Callable[[Any], Any]
"""From a leaf's value to what came of it: plain values that can be compared."""


@dataclass(frozen=True)
class Case:
    """Values of one leaf and what shows their effect.

    Attributes:
        values: Two or more; each pair of them must differ in its outcome.
        probe: Puts a value into a recipe and gives back what followed from it.
        refused: Values that must be refused instead, by an error of lorafit.
    """

    values: tuple[Any, ...]
    probe: Probe
    refused: tuple[Any, ...] = ()


def leaves(slot: Slot, name: str = "") -> Iterator[str]:
    """The name of every leaf below a slot, of every kind and form."""
    if isinstance(slot, Group):
        yield from [name] if slot.nullable else []
        for field in fields_of(slot.model).values():
            yield from leaves(field.slot, f"{name}.{field.name}" if name else field.name)
    elif isinstance(slot, Choice):
        yield from [name] if len(slot.kinds) > 1 or slot.nullable else []
        for kind, model in slot.kinds.items():
            yield from leaves(Group(model), f"{name}({kind})")
    elif isinstance(slot, Variants):
        yield name
        for form in slot.forms.values():
            yield from (leaf for leaf in leaves(form, name) if leaf != name)
    elif isinstance(slot, Items):
        yield name
        yield from leaves(slot.item, f"{name}[]") if not isinstance(slot.item, Leaf) else []
    else:
        yield name


def every_value(slot: Slot, leaf: str) -> set[Any]:
    """The words that a leaf may hold, where the schema lists them: a Literal's, and the kinds of a choice."""
    found: set[Any] = set()
    for name, below in _named(slot):
        if name != leaf:
            continue
        if isinstance(below, Choice):
            found |= set(below.kinds)
        elif isinstance(below, Leaf):
            found |= {value for form, _ in below.forms for value in get_args(form) if isinstance(value, str)}
    return found


def _named(slot: Slot, name: str = "") -> Iterator[tuple[str, Slot]]:
    """Slots by the same names, where one may list its words."""
    yield name, slot
    if isinstance(slot, Group):
        for field in fields_of(slot.model).values():
            yield from _named(field.slot, f"{name}.{field.name}" if name else field.name)
    elif isinstance(slot, Choice):
        for kind, model in slot.kinds.items():
            yield from _named(Group(model), f"{name}({kind})")
    elif isinstance(slot, Variants):
        for form in slot.forms.values():
            yield from _named(form, name)
    elif isinstance(slot, Items) and not isinstance(slot.item, Leaf):
        yield from _named(slot.item, f"{name}[]")


def without_a_case(slot: Slot, cases: Mapping[str, Case]) -> list[str]:
    """Leaves that no case shows alive."""
    return sorted(set(leaves(slot)) - set(cases))


def without_a_leaf(slot: Slot, cases: Mapping[str, Case]) -> list[str]:
    """Cases of leaves that the schema does not have any more."""
    return sorted(set(cases) - set(leaves(slot)))


def faults_of(case: Case) -> list[str]:
    """Why a leaf looks dead, or its case shows nothing; empty where it is alive.

    The first value is tried twice: an outcome that changes by itself proves nothing.
    """
    if len(case.values) + len(case.refused) < 2 or not case.values:
        return ["the case has no two values"]
    outcomes = [case.probe(value) for value in case.values]
    found = [] if case.probe(case.values[0]) == outcomes[0] else ["the outcome changes by itself"]
    pairs = combinations(zip(case.values, outcomes, strict=True), 2)
    found += [f"{one!r} and {other!r} do the same" for (one, came), (other, too) in pairs if came == too]
    for value in case.refused:
        try:
            case.probe(value)
        except LorafitError:
            continue
        found.append(f"{value!r} was not refused")
    return found
