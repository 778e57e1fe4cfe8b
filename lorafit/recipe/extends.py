"""A recipe's layers, lowest first: what it extends, the file itself, `--set` flags. Higher ones win, key by key.

    configs/presets/code.yaml  <-extends-  team.yaml  <-extends-  recipe.yaml  <-  --set training.epochs=1

Sections merge key by key, and so does a kind with the same kind. Lists, values and other kinds are replaced whole.
Every value keeps the place that it was written at.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorafit.console.nearest import nearest
from lorafit.errors import LorafitError, Problems, RecipeError, SafetyError, UsageError, raise_all
from lorafit.files.strict_json import JsonError, read_regular_file
from lorafit.machine.shipped import shipped
from lorafit.recipe.paths import absolute, moved
from lorafit.recipe.reader import MOST_BYTES, decode, read_tree, read_value
from lorafit.recipe.schema_tree import (
    Choice,
    Group,
    Slot,
    Table,
    expand,
    kind_of,
    recipe_outline,
    slot_below,
    variant_of,
)
from lorafit.recipe.secrecy import find_secrets, is_secret_key, is_secret_value, shown_flag
from lorafit.recipe.yaml_tree import (
    Entry,
    KeyPath,
    Place,
    Unreadable,
    entry_of,
    find,
    key_text,
    mapping,
    parse_key,
    shown,
    with_entry,
)

FLAG = "--set "
"""What the place of a flag's value begins with."""
_LONGEST_CHAIN = 16
_SHOWN_FLAG_CHARACTERS = 60


@dataclass(frozen=True)
class Layers:
    """All layers of a recipe as one tree.

    Attributes:
        tree: The merged values.
        errors: What is wrong with the text of the layers.
        is_whole: Whether everything that the recipe extends could be read; else what is missing may stand there.
    """

    tree: Entry
    errors: list[LorafitError]
    is_whole: bool


@dataclass(frozen=True)
class _Source:
    """One file of the chain: what messages call it, and where it is."""

    shown: str
    path: Path


def read_layers(path: Path, overrides: Sequence[str], values: Mapping[str, Any] | None = None) -> Layers:
    """Reads a recipe, everything it extends, and the flags over it.

    Args:
        path: The recipe's file; where `values` are given, what messages and relative paths go by.
        overrides: `KEY=VALUE` flags.
        values: The recipe as plain values, instead of the file's.

    Raises:
        UsageError: The recipe cannot be read, or a flag is no KEY=VALUE.
        RecipeError: The recipe is no YAML mapping at all.
    """
    flags = [_read_flag(flag) for flag in overrides]
    file = str(path)
    if values is None:
        tree, errors = _read_one(decode(read_bytes(path), file), Place(file, 1, 1))
    else:
        tree, errors = _checked(entry_of(values, Place(path.name)), [])
    for key, entry, _ in flags:
        if key == ("extends",):
            tree = with_entry(tree, key, entry)
    merged, more = _with_extended(tree, [_Source(file, path)])
    errors += more
    for key, entry, flag_errors in flags:
        errors += flag_errors
        if key != ("extends",):
            merged, flag_error = _with_flag(merged, key, entry)
            errors += flag_error
    return Layers(merged, errors, is_whole=not more)


def read_bytes(path: Path) -> bytes:
    """At most one byte more than a recipe may have.

    Raises:
        UsageError: There is no such file, or it cannot be read.
    """
    try:
        return read_regular_file(path, MOST_BYTES + 1)
    except (OSError, JsonError) as error:
        told = error.what if isinstance(error, JsonError) else error.strerror or type(error).__name__
        reason = "is a directory" if isinstance(error, JsonError) and path.is_dir() else told.lower()
        shown_path = str(path) if len(str(path)) <= 120 else f"{str(path)[:119]}…"
        raise UsageError(reason, file=shown_path, todo="name a recipe, a YAML file") from None


def _read_one(text: str, place: Place) -> tuple[Entry, list[LorafitError]]:
    """One file's tree without its secrets.

    Raises:
        LorafitError: It is no mapping.
    """
    tree, problems = read_tree(text, place)
    return _checked(tree, list(problems))


def _checked(tree: Entry, errors: list[LorafitError]) -> tuple[Entry, list[LorafitError]]:
    file = tree.place.file
    if not isinstance(tree.value, dict):
        raise_all(errors, file=file)
        if tree.value is None:
            raise RecipeError("the recipe is empty", file=file, todo="lorafit needs at least name, model and data")
        raise RecipeError(
            f"expected a mapping of sections, found {shown(tree)}", **tree.place.known, todo="start with name: my-run"
        )
    tree, secrets = _without_secrets(tree)
    hidden = tuple(secret.key for secret in secrets if secret.key)
    return tree, [*secrets, *(error for error in errors if not (error.key or "").startswith(hidden))]


def _without_secrets(tree: Entry) -> tuple[Entry, list[SafetyError]]:
    secrets = find_secrets(tree)
    for path, _ in secrets:
        entry = find(tree, path)
        if isinstance(path[-1], str) and (is_secret_key(path[-1]) or is_secret_value(path[-1])):
            tree = with_entry(tree, path, None)
        elif entry is not None:
            tree = with_entry(tree, path, replace(entry, value=Unreadable.VALUE))
    return tree, [error for _, error in secrets]


def _with_extended(tree: Entry, chain: list[_Source]) -> tuple[Entry, list[LorafitError]]:
    """A file's tree over everything that it extends."""
    extends = tree.value.get("extends")
    tree = with_entry(tree, ("extends",), None)
    if extends is None or extends.value is None or extends.value is Unreadable.VALUE:
        return tree, []
    try:
        source = _extended_source(extends, chain)
        place = Place(source.shown, 1, 1)
        below, errors = _read_one(decode(_extended_bytes(source, extends), source.shown), place)
    except LorafitError as error:
        return tree, list(error.errors) if isinstance(error, Problems) else [error]
    below, more = _with_extended(below, [*chain, source])
    here, there = chain[-1].path.parent, source.path.parent
    below = moved(below, absolute(there), absolute(here))
    return merge(below, tree, recipe_outline()), [*errors, *more]


def _extended_source(extends: Entry, chain: list[_Source]) -> _Source:
    at = {**extends.place.known, "key": "extends"}
    name = extends.value
    if not isinstance(name, str) or not name.strip():
        raise RecipeError(f"expected the name of a preset or the path of a recipe, found {shown(name)}", **at)
    if name.endswith((".yaml", ".yml")) or "/" in name:
        source = _Source(os.path.normpath(Path(chain[-1].shown).parent / name), chain[-1].path.parent / name)
    else:
        source = _Source(f"presets/{name}.yaml", shipped("presets", f"{name}.yaml"))
        presets = preset_names()
        if name not in presets:
            close = nearest(name, presets, count=1)
            hint = f"did you mean {close[0]}? " if close else ""
            todo = f"{hint}available: {', '.join(presets)}; or name a .yaml file"
            raise RecipeError(f"no such preset {shown(name)}", **at, todo=todo)
    known = [os.path.realpath(link.path) for link in chain]
    if os.path.realpath(source.path) in known:
        circle = " > ".join(
            Path(link.shown).name for link in [*chain[known.index(os.path.realpath(source.path)) :], source]
        )
        raise RecipeError(f"recipes extend each other in a circle: {circle}", **at, todo="take one extends away")
    if len(chain) > _LONGEST_CHAIN:
        raise RecipeError(f"more than {_LONGEST_CHAIN} recipes extend each other", **at, todo="write a shorter chain")
    return source


def _extended_bytes(source: _Source, extends: Entry) -> bytes:
    try:
        return read_bytes(source.path)
    except UsageError as error:
        what = f"{source.shown}: {error.what}"
        raise RecipeError(what, **extends.place.known, key="extends", todo="paths are relative to this file") from None


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(path.stem for path in shipped("presets").glob("*.yaml"))


def merge(below: Entry, above: Entry, slot: Slot | None) -> Entry:
    """`above` laid over `below`, key by key where both are the same section or the same kind."""
    form = variant_of(slot, above)
    if isinstance(form, Choice):
        below, above = expand(form, below), expand(form, above)
        named = isinstance(above.value, dict) and "kind" in above.value
        if named and kind_of(form, above) != kind_of(form, below):
            return above
    elif not isinstance(form, Group | Table) or form is not variant_of(slot, below):
        return above
    if not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    entries = dict(below.value)
    for key, entry in above.value.items():
        under = entries.get(key)
        entries[key] = merge(under, entry, slot_below(form, above, key)) if under is not None else entry
    return mapping(entries, above.place, above.key_place)


def _read_flag(flag: str) -> tuple[KeyPath, Entry, list[LorafitError]]:
    """One `KEY=VALUE` as a key path and an entry.

    Raises:
        UsageError: It is no KEY=VALUE.
    """
    key, equals, text = flag.partition("=")
    key, text = key.strip(), text.strip()
    words = shown_flag(flag)
    words = words if len(words) <= _SHOWN_FLAG_CHARACTERS else f"{words[: _SHOWN_FLAG_CHARACTERS - 1]}…"
    place = Place(f"{FLAG}{words}")
    try:
        path = parse_key(key)
    except ValueError:
        raise UsageError(
            "no key such as training.epochs or data.train[0].path",
            file=place.file,
            todo="write --set KEY=VALUE, e.g. training.epochs=1",
        ) from None
    if not equals:
        raise UsageError("no '=' in it", file=place.file, todo="write --set KEY=VALUE, e.g. training.epochs=1")
    entry, errors = read_value(text, place, path)
    return path, entry, list(errors)


def _with_flag(tree: Entry, path: KeyPath, entry: Entry) -> tuple[Entry, list[LorafitError]]:
    """The tree with one flag's value in it, or as it was, with the reason."""
    wrapped = entry
    for part in reversed(path):
        wrapped = mapping({str(part): wrapped}, entry.place)
    _, secrets = _without_secrets(wrapped)
    if secrets:
        return tree, list(secrets)
    try:
        return _set(tree, path, entry, recipe_outline(), path), []
    except RecipeError as error:
        return tree, [error]


def _set(tree: Entry | None, path: KeyPath, new: Entry, slot: Slot | None, whole: KeyPath) -> Entry:
    if not path:
        return merge(tree, new, slot) if tree is not None else new
    part, rest, at = path[0], path[1:], {**new.place.known, "key": key_text(whole)}
    if tree is None or tree.value is None or tree.value is Unreadable.VALUE:
        tree = mapping({}, new.place)
    tree = expand(slot, tree)
    done = key_text(whole[: len(whole) - len(path)]) or "the recipe"
    if isinstance(tree.value, tuple):
        number = int(part) if isinstance(part, int) or part.isdecimal() else None
        if number is None or number >= len(tree.value):
            items = ", ".join(f"{done}[{n}]" for n in range(len(tree.value))) or f"nothing in {done}"
            raise RecipeError(f"{done} is a list of {len(tree.value)}", **at, todo=f"there is {items}")
        below = _set(tree.value[number], rest, new, slot_below(slot, tree, number), whole)
        return with_entry(tree, (number,), below)
    if not isinstance(tree.value, dict) or isinstance(part, int):
        raise RecipeError(
            f"{done} holds {shown(tree)}, which has no {key_text((part,))}", **at, todo=f"set {done} itself"
        )
    below = _set(tree.value.get(part), rest, new, slot_below(slot, tree, part), whole)
    return mapping({**tree.value, part: below}, tree.place, tree.key_place)
