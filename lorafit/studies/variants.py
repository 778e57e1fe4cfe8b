"""What a comparison compares: recipes, or one recipe with another value at some keys; and the learning rates of each.

adapter=lora,dora                            {kind: dora, r: 4, ...}: what both kinds have stays as in the recipe
training.optimizer=adamw,sgd adapter=lora,dora      every pair: four variants
--rates 3 --spread 10      0.32, 1 and 3.2 times the recipe's learning rate, times what the method usually wants
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import LorafitError, RecipeError, UsageError, raise_all
from lorafit.kinds.adapters import usual_rate
from lorafit.kinds.section import KindSection
from lorafit.recipe.extends import FLAG
from lorafit.recipe.load import LoadedRecipe, is_well_formed, load_recipe
from lorafit.recipe.reader import read_value
from lorafit.recipe.schema import Recipe
from lorafit.recipe.schema_tree import expand, fields_of, kind_of, kinds_of, node_at
from lorafit.recipe.yaml_tree import Entry, Place, entry_of, parse_key, plain

_FLAG = "--over"
_SHARED = ("data.validation", "data.test", "task")
"""What recipes that are compared have in common, so that the same rows score them in the same way."""
_SHARED_BY_RUNS = ("data", "seed", "training.batch_size", "training.epochs", "training.max_steps")
"""What they have in common besides, unless it is what is compared."""


@dataclass(frozen=True)
class Variant:
    """One method of a comparison.

    Attributes:
        name: What tables call it.
        recipe: The recipe that it is a variant of.
        overrides: What makes it that variant.
        loaded: The recipe with that; None where it is refused.
        notes: Options of the recipe that the method has not.
        rate_scale: What its adapter wants of a learning rate, as a multiple of what the recipe's own adapter wants.
        refused: Why it cannot be run; empty where it can.
    """

    name: str
    recipe: Path | JsonMapping
    overrides: tuple[str, ...]
    loaded: LoadedRecipe | None
    notes: tuple[str, ...] = ()
    rate_scale: float = 1.0
    refused: str = ""
    error: LorafitError | None = field(default=None, repr=False, compare=False)

    @property
    def folder(self) -> str:
        """The name as that of a folder."""
        return re.sub(r"[^\w.=+-]+", "-", self.name).strip("-.") or "method"

    def values(self) -> JsonObject:
        """The recipe's values, by which a resume knows that it is the same."""
        return self.loaded.recipe.model_dump(mode="json", exclude={"output"}) if self.loaded is not None else {}


def read_variants(
    recipes: Sequence[Path | JsonMapping], over: Sequence[str], overrides: Sequence[str]
) -> tuple[list[Variant], list[str]]:
    """The variants in the order that they are named in, and the keys that they differ in.

    Raises:
        UsageError: There is one alone, or one alone is not refused; a key is named twice; recipes are of other rows.
        LorafitError: A recipe is wrong, a value is one that no recipe can have, or every variant is refused.
    """
    choices = [_read_over(text) for text in over]
    keys = [key for key, _ in choices]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UsageError(f"{twice} is named twice", key=_FLAG, todo="list all of its values behind one")
    found: list[Variant] = []
    for recipe in recipes:
        loaded = load_recipe(recipe, overrides)
        named = [loaded.recipe.name] if len(recipes) > 1 else []
        for values in product(*(values for _, values in choices)):
            found.append(_make(recipe, loaded, overrides, list(zip(keys, values, strict=True)), named))
    if len(found) < 2:
        todo = "add --over adapter=lora,dora, or name another recipe"
        raise UsageError("one method alone cannot be compared", key=_FLAG, todo=todo)
    wrong = [v for v in found if v.error is not None and not is_well_formed(v.recipe, v.overrides)]
    live = [variant for variant in found if variant.error is None]
    if wrong or not live:
        errors = [error for v in wrong or found if v.error is not None for error in v.error.errors]
        for error in errors:  # what --set says was judged without --over
            error.file = _FLAG if (error.file or "").startswith(FLAG) else error.file
        raise_all(list({error.one_line: error for error in errors}.values()), file=str(recipes[0]))
    if len(live) == 1:
        reasons = "; ".join(f"{variant.name}: {variant.refused}" for variant in found if variant.refused)
        what, todo = f"{live[0].name} is left alone, since others are refused ({reasons})", "name another value"
        raise UsageError(what, key=_FLAG, todo=todo)
    _check_shared([variant for variant in found if variant.loaded is not None], keys)
    return list(_told_apart(found)), keys


def rates_of_variant(variant: Variant, given: Sequence[float], rates: int, spread: float) -> list[float]:
    """The learning rates that a variant is run with, ascending.

    Args:
        variant: Not refused.
        given: The same for all; empty: a geometric grid around the recipe's, by what the variant's adapter wants.
        rates: Their number.
        spread: The highest / the lowest.
    """
    if given or variant.loaded is None:
        return sorted(dict.fromkeys(given))
    own = variant.loaded.recipe.training.learning_rate * variant.rate_scale
    powers = [number / (rates - 1) - 0.5 if rates > 1 else 0.0 for number in range(rates)]
    return [float(f"{own * spread**power:.3g}") for power in powers]


def _read_over(text: str) -> tuple[str, list[str]]:
    """`KEY=A,B` as the key and its values; commas inside of brackets and quotes part none.

    Raises:
        UsageError: It is none.
    """
    key, equals, listed = text.partition("=")
    values = [part.strip() for part in _split(listed)]
    try:
        parse_key(key.strip())
        is_list = bool(equals) and all(values)
    except ValueError:
        is_list = False
    if not is_list:
        raise UsageError(f"'{text[:60]}' is no KEY=A,B", key=_FLAG, todo="write e.g. --over adapter=lora,dora")
    return key.strip(), values


def _split(text: str) -> Iterator[str]:
    depth, start, quote = 0, 0, ""
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "{[":
            depth += 1
        elif letter in "}]":
            depth -= 1
        elif letter == "," and depth == 0:
            yield text[start:place]
            start = place + 1
    yield text[start:]


def _make(
    recipe: Path | JsonMapping,
    loaded: LoadedRecipe,
    overrides: Sequence[str],
    values: Sequence[tuple[str, str]],
    named: Sequence[str],
) -> Variant:
    """One variant; one whose recipe is wrong is refused with the reason."""
    flags, notes, names = list(overrides), list[str](), list(named)
    for key, value in values:
        flag, name, left_out = _laid_over(loaded.recipe, key, value)
        flags += [flag] if flag else []
        names.append(name)
        notes += [f"{name} takes no {', '.join(left_out)}"] if left_out else []
    name = " ".join(names)
    try:
        made = load_recipe(recipe, flags)
        scale = usual_rate(made.recipe.adapter) / usual_rate(loaded.recipe.adapter)
        return Variant(name, recipe, tuple(flags), made, tuple(notes), scale)
    except RecipeError as error:
        return _refused(name, recipe, flags, notes, error)
    except LorafitError as problems:
        if not all(isinstance(one, RecipeError) for one in problems.errors):
            raise
        return _refused(name, recipe, flags, notes, problems)


def _refused(
    name: str, recipe: Path | JsonMapping, flags: Sequence[str], notes: Sequence[str], error: LorafitError
) -> Variant:
    first = error.errors[0]
    why = ": ".join(part for part in (first.key, first.what) if part)
    return Variant(name, recipe, tuple(flags), None, tuple(notes), refused=why, error=error)


def _laid_over(recipe: Recipe, key: str, value: str) -> tuple[str, str, list[str]]:
    """A value at a key as an override (empty: the recipe has it already), its name, and options that it cannot keep.

    A value that names another kind than the recipe's keeps those of the recipe's written options that it has too.
    """
    place, path = Place(f"{_FLAG} {key}"), parse_key(key)
    entry, errors = read_value(value, place, path)
    raise_all(errors, file=place.file)
    tree = entry_of(recipe.model_dump(mode="json"), place)
    node = node_at(path, tree)
    if not kinds_of(node):
        return f"{key}={value}", f"{path[-1]!s}={value}", []
    new = expand(node, entry)
    kind = kind_of(node, new)
    section: object = recipe
    for part in path:
        section = getattr(section, str(part), None)
    options = [f"{option}={held}" for option, held in _as_mapping(new).items() if option != "kind"]
    name = " ".join([kind, *options]) if kind is not None else value
    if not isinstance(section, KindSection) or not isinstance(new.value, dict) or kind is None:
        return f"{key}={value}", name, []
    if section.kind == kind:
        return ("" if set(new.entries) <= {"kind"} else f"{key}={value}"), name, []
    written = section.model_dump(mode="json", include=section.model_fields_set - {"kind"})
    allowed = fields_of(node, Entry({"kind": entry_of(kind, place)}, place, place))
    kept = {option: held for option, held in written.items() if option in allowed and option not in new.entries}
    left_out = [option for option in written if option not in allowed] if kind in kinds_of(node) else []
    whole = {"kind": kind, **kept, **_as_mapping(new)}
    return f"{key}={json.dumps(whole)}", name, left_out


def _as_mapping(entry: Entry) -> JsonObject:
    values = plain(entry)
    return values if isinstance(values, dict) else {}


def _told_apart(variants: Sequence[Variant]) -> Iterator[Variant]:
    """The variants with names of their own: of two that are called alike, the second gets its number."""
    folders = {"base", "plans", "scores"}  # what is called so already
    for variant in variants:
        named, number = variant, 1
        while named.folder in folders:
            number += 1
            named = replace(variant, name=f"{variant.name} ({number})")
        folders.add(named.folder)
        yield named


def _check_shared(variants: Sequence[Variant], keys: Sequence[str]) -> None:
    """Refuses variants that could not be compared row by row, or that learn from other rows unasked.

    Raises:
        UsageError: As said.
    """
    first, *others = [variant for variant in variants if variant.loaded is not None]
    shared = [*_SHARED, *(key for key in _SHARED_BY_RUNS if not any(_touches(key, over) for over in keys))]
    for variant in others:
        for key in shared:
            if _value_at(first.values(), key) != _value_at(variant.values(), key):
                what = f"{first.name} and {variant.name} differ in {key}, so that their runs cannot be compared"
                raise UsageError(what, key=_FLAG, todo="give both the same")


def _touches(key: str, over: str) -> bool:
    return over == key or over.startswith((f"{key}.", f"{key}[")) or key.startswith(f"{over}.")


def _value_at(values: Mapping[str, object], key: str) -> object:
    found: object = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
