"""A recipe's layers, lowest first: what it extends, the file itself, `--set` flags. Higher ones win, key by key.

    configs/presets/code.yaml  <-extends-  team.yaml  <-extends-  recipe.yaml  <-  --set training.epochs=1

Sections merge key by key, and so does a kind with the same kind. Lists, values and other kinds are replaced whole.
Every value keeps the place that it was written at.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorafit.console.nearest import did_you_mean
from lorafit.errors import LorafitError, RecipeError, UsageError, raise_all
from lorafit.files.rundir import RunDir
from lorafit.files.strict_json import JsonError, read_regular_file
from lorafit.machine.shipped import shipped
from lorafit.recipe.cross_field_rules import DATA_SUFFIXES
from lorafit.recipe.paths import absolute, moved
from lorafit.recipe.reader import MOST_BYTES, decode, read_tree, read_value
from lorafit.recipe.schema_tree import Node, expand, form_of, kind_of, kinds_of, node_at, node_below, recipe_tree
from lorafit.recipe.secrecy import shown_flag, without_secrets
from lorafit.recipe.yaml_tree import (
    Entry,
    KeyPath,
    Place,
    Plain,
    Unreadable,
    entry_of,
    key_text,
    parse_key,
    shown,
    with_entry,
)

FLAG = "--set "
"""What the place of a flag's value begins with."""
_LONGEST_CHAIN = 16
_SHOWN_FLAG_CHARACTERS = 60
_SHOWN_PATH_CHARACTERS = 120


@dataclass(frozen=True)
class Layers:
    """The layers of a recipe, merged into one tree.

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


def read_layers(path: Path, overrides: Sequence[str], values: Plain = None, flags_from: Path | None = None) -> Layers:
    """Reads a recipe, everything it extends, and the flags over it.

    Args:
        path: The recipe's file; where `values` are given, what messages and relative paths go by.
        overrides: `KEY=VALUE` flags.
        values: The recipe as plain values, instead of the file's.
        flags_from: Folder that relative paths of the flags start from, where that is not the recipe's.

    Raises:
        UsageError: The recipe cannot be read, or a flag is no KEY=VALUE.
        RecipeError: The recipe is no YAML mapping at all.
    """
    flags, file = [_read_flag(flag) for flag in overrides], str(path)
    if values is None:
        tree, errors = _read_file(path, file)
    else:
        tree, errors = _checked(entry_of(values, Place(path.name)), [])
    if flags_from is not None:
        flags = [(key, _moved_flag(entry, key, tree, flags_from, path.parent), wrong) for key, entry, wrong in flags]
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


def _read_file(path: Path, named: str) -> tuple[Entry, list[LorafitError]]:
    """The tree of a recipe file, which messages call `named`, without its secrets.

    Raises:
        UsageError: There is no such file, or it cannot be read.
        LorafitError: It is no mapping.
    """
    try:
        raw = read_regular_file(path, MOST_BYTES + 1)
    except (OSError, JsonError) as error:
        told = error.what if isinstance(error, JsonError) else error.strerror or type(error).__name__
        reason = "is a directory" if isinstance(error, JsonError) and path.is_dir() else told.lower()
        named = named if len(named) <= _SHOWN_PATH_CHARACTERS else f"{named[: _SHOWN_PATH_CHARACTERS - 1]}…"
        if reason == "is a directory" and (run := RunDir(path)).manifest.is_file() and run.recipe.is_file():
            its = shlex.quote(str(Path(named) / run.recipe.name))
            todo = f"to go on with it: lorafit train {its} --resume"
            raise UsageError("is a run folder, not a recipe", file=named, todo=todo) from None
        raise UsageError(reason, file=named, todo="name a recipe, a YAML file") from None
    try:
        tree, errors = read_tree(decode(raw, named), Place(named, 1, 1))
        if path.suffix.lower() not in DATA_SUFFIXES or {"model", "data", "extends"} & set(tree.entries):
            return _checked(tree, errors)
    except RecipeError:
        if path.suffix.lower() not in DATA_SUFFIXES:
            raise
    todo = "name a recipe, a YAML file, whose data.train names these rows"
    raise RecipeError("looks like rows, not like a recipe", file=named, todo=todo)


def _checked(tree: Entry, problems: Sequence[LorafitError]) -> tuple[Entry, list[LorafitError]]:
    file = tree.place.file
    if not isinstance(tree.value, dict):
        raise_all(problems, file=file)
        if tree.value is None:
            raise RecipeError("the recipe is empty", file=file, todo="lorafit needs at least name, model and data")
        raise tree.place.error(f"expected a mapping of sections, found {shown(tree)}", todo="start with name: my-run")
    tree, secrets = without_secrets(tree)
    hidden = tuple(secret.key for secret in secrets if secret.key)
    return tree, [*secrets, *(error for error in problems if not (error.key or "").startswith(hidden))]


def _with_extended(tree: Entry, chain: list[_Source]) -> tuple[Entry, list[LorafitError]]:
    """A file's tree over everything that it extends."""
    extends = tree.entries.get("extends")
    tree = with_entry(tree, ("extends",), None)
    if extends is None or extends.value in (None, Unreadable.VALUE):
        return tree, []
    try:
        source = _extended_source(extends, chain)
        below, errors = _read_file(source.path, source.shown)
    except UsageError as error:  # of the file that it names
        todo = "paths are relative to this file"
        return tree, [extends.place.error(f"{error.file}: {error.what}", ("extends",), todo)]
    except LorafitError as error:
        return tree, list(error.errors)
    below, more = _with_extended(below, [*chain, source])
    here, there = chain[-1].path.parent, source.path.parent
    below = moved(below, absolute(there), absolute(here))
    return merge(below, tree, recipe_tree()), [*errors, *more]


def _extended_source(extends: Entry, chain: list[_Source]) -> _Source:
    name, place, key = extends.value, extends.place, ("extends",)
    if not isinstance(name, str) or not name.strip():
        raise place.error(f"expected the name of a preset or the path of a recipe, found {shown(name)}", key)
    if name.endswith((".yaml", ".yml")) or "/" in name:
        source = _Source(os.path.normpath(Path(chain[-1].shown).parent / name), chain[-1].path.parent / name)
    else:
        source = _Source(f"presets/{name}.yaml", shipped("presets", f"{name}.yaml"))
        presets = preset_names()
        if name not in presets:
            hint = did_you_mean(name, presets)
            todo = f"{hint}available: {', '.join(presets)}; or name a .yaml file"
            raise place.error(f"no such preset {shown(name)}", key, todo)
    known = [os.path.realpath(link.path) for link in chain]
    if os.path.realpath(source.path) in known:
        links = [*chain[known.index(os.path.realpath(source.path)) :], source]
        circle = " > ".join(Path(link.shown).name for link in links)
        raise place.error(f"recipes extend each other in a circle: {circle}", key, "take one extends away")
    if len(chain) > _LONGEST_CHAIN:
        raise place.error(f"more than {_LONGEST_CHAIN} recipes extend each other", key, "write a shorter chain")
    return source


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(path.stem for path in shipped("presets").glob("*.yaml"))


def merge(below: Entry, above: Entry, node: Node | None) -> Entry:
    """Lays `above` over `below`, key by key where both are the same section or the same kind."""
    low, high = expand(node, below), expand(node, above)
    if node is None or not isinstance(low.value, dict) or not isinstance(high.value, dict):
        return above
    if kinds_of(node):
        if "kind" in high.value and kind_of(node, high) != kind_of(node, low):
            return above
    elif form_of(node, high) is not form_of(node, low):
        return above
    entries = dict(low.value)
    for key, entry in high.value.items():
        under = entries.get(key)
        entries[key] = merge(under, entry, node_below(node, high, key)) if under is not None else entry
    return replace(above, value=entries)


def _read_flag(flag: str) -> tuple[KeyPath, Entry, list[LorafitError]]:
    """One `KEY=VALUE` as a key path and an entry.

    Raises:
        UsageError: It is no KEY=VALUE.
    """
    key, equals, text = flag.partition("=")
    key, text = key.strip(), text.strip()
    words = shown_flag(flag)
    words = words if len(words) <= _SHOWN_FLAG_CHARACTERS else f"{words[: _SHOWN_FLAG_CHARACTERS - 1]}…"
    place, todo = Place(f"{FLAG}{words}"), "write --set KEY=VALUE, e.g. training.epochs=1"
    try:
        path = parse_key(key)
    except ValueError:
        raise UsageError("no key such as training.epochs or data.train[0].path", file=place.file, todo=todo) from None
    if not equals:
        raise UsageError("no '=' in it", file=place.file, todo=todo)
    entry, errors = read_value(text, place, path)
    return path, entry, list(errors)


def _moved_flag(entry: Entry, key: KeyPath, tree: Entry, old: Path, new: Path) -> Entry:
    """A flag's value, typed in folder `old`, as it reads in the recipe of folder `new`."""
    numbered = tuple(int(part) if isinstance(part, str) and part.isdecimal() else part for part in key)
    node = node_at(numbered, tree)
    return moved(entry, old, new, node=node) if node is not None else entry


def _with_flag(tree: Entry, path: KeyPath, entry: Entry) -> tuple[Entry, list[LorafitError]]:
    """The tree with one flag's value in it, or as it was, with the reason."""
    wrapped = entry
    for part in reversed(path):
        wrapped = Entry({str(part): wrapped}, entry.place, entry.place)
    _, secrets = without_secrets(wrapped)
    if secrets:
        return tree, list(secrets)
    try:
        return _set(tree, path, entry, recipe_tree(), path), []
    except RecipeError as error:
        return tree, [error]


def _set(tree: Entry | None, path: KeyPath, new: Entry, node: Node | None, whole: KeyPath) -> Entry:
    """A part of the recipe, which the schema calls `node`, with a flag's value at `path` in it; `whole` is the key."""
    if not path:
        return merge(tree, new, node) if tree is not None else new
    if tree is None or tree.value in (None, Unreadable.VALUE):
        tree = Entry({}, new.place, new.place)
    part, rest, done = path[0], path[1:], key_text(whole[: len(whole) - len(path)]) or "the recipe"
    if not isinstance(tree.value, dict) or not isinstance(part, str):
        tree = expand(node, tree)
    if isinstance(tree.value, tuple):
        number = int(part) if isinstance(part, int) or part.isdecimal() else None
        if number is None or number >= len(tree.value):
            items = ", ".join(f"{done}[{n}]" for n in range(len(tree.value))) or f"nothing in {done}"
            raise new.place.error(f"{done} is a list of {len(tree.value)}", whole, f"there is {items}")
        return with_entry(tree, (number,), _set(tree.value[number], rest, new, node_below(node, tree, number), whole))
    if not isinstance(tree.value, dict) or isinstance(part, int):
        what = f"{done} holds {shown(tree)}, which has no {key_text((part,))}"
        raise new.place.error(what, whole, f"set {done} itself")
    return with_entry(tree, (part,), _set(tree.value.get(part), rest, new, node_below(node, tree, part), whole))
