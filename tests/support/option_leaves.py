"""Every leaf of the recipe's schema by name, and what it takes to show that a leaf is no dead option.

    training.max_steps                   a value
    training.optimizer                   which kind
    training.optimizer(adamw).eps        an option of one kind
    data.train[].path                    a field of a list's items

A leaf is alive where two values of it lead to two outcomes: numbers, tensors, labels, files or errors that somebody
else than the recipe's own text, digest or plan shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from lorafit.errors import LorafitError
from lorafit.recipe.schema_tree import Node, forms, is_nullable, kinds_of, section_of, sections_in, words

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


def leaves(node: Node, name: str = "") -> dict[str, Node]:
    """Every leaf of a part of the schema by its name, of every kind and form."""
    kinds, sources = kinds_of(node), [section for form in forms(node) for section in sections_in(form)]
    is_leaf = len(kinds) > 1 or is_nullable(node) or not (kinds or section_of(node))
    found = {name: node} if is_leaf else {}
    sections = [(f"{name}({kind})", section) for kind, section in kinds.items()]
    sections += [(name, form) for form in forms(node) if form.get("properties") and not kinds and form not in sources]
    sections += [(f"{name}[]", section) for section in sources]
    for above, section in sections:
        for key, field in section["properties"].items():
            found |= leaves(field, f"{above}.{key}".removeprefix(".")) if key != "kind" else {}
    return found


def every_value(node: Node) -> set[str]:
    """The words that a leaf may hold, where the schema lists them, lists of them apart."""
    return {word for form in forms(node) if "items" not in form for word in words(form)}


def without_a_case(node: Node, cases: Mapping[str, Case]) -> list[str]:
    """Leaves that no case shows alive."""
    return sorted(set(leaves(node)) - set(cases))


def without_a_leaf(node: Node, cases: Mapping[str, Case]) -> list[str]:
    """Cases of leaves that the schema does not have any more."""
    return sorted(set(cases) - set(leaves(node)))


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
