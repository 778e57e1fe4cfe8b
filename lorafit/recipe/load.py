"""From a recipe file to a Recipe: every error at once, each with file, line, column, key and what to do."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.errors import LorafitError, SafetyError, raise_all
from lorafit.recipe.agreement import disagreements
from lorafit.recipe.dump import dump_yaml
from lorafit.recipe.explain import Finding, explain, finding
from lorafit.recipe.layers import read_layers
from lorafit.recipe.outline import Group, plain, recipe_outline, slot_at
from lorafit.recipe.paths import absolute, moved
from lorafit.recipe.tree import (
    Entry,
    KeyPath,
    Place,
    Unreadable,
    entry_of,
    find,
    nearest_entry,
    parse_key,
    walk,
    with_entry,
)

if TYPE_CHECKING:
    from lorafit.recipe.schema import Recipe

_ROUNDS = 5


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and where it came from.

    Attributes:
        recipe: The values.
        folder: The recipe's folder, absolute; its relative paths start there.
        file: The recipe as the user named it.
        digest: SHA-256 of the resolved values; formatting, comments and places do not count.
        output: The run folder, absolute.
    """

    recipe: Recipe
    folder: Path
    file: str
    digest: str
    output: Path
    _tree: Entry = field(repr=False)

    def place(self, key: str) -> dict[str, Any]:
        """Where a key stands, as arguments of an error: `RecipeError(what, key=key, **loaded.place(key))`.

        A key that was not written stands where the section around it does.
        """
        return nearest_entry(self._tree, parse_key(key)).at.known

    def path(self, text: str) -> Path:
        """A path of the recipe, absolute."""
        return self.folder / text


def load_recipe(path: Path, overrides: Sequence[str] = (), *, output: str | Path | None = None) -> LoadedRecipe:
    """Reads a recipe with what it extends and the flags over it, and checks all of it.

    Args:
        path: The recipe.
        overrides: `KEY=VALUE` flags, e.g. `training.epochs=1` or `data.train[0].path=a.jsonl`.
        output: A run folder instead of the recipe's; relative to the working folder.

    Raises:
        UsageError: The file cannot be read, or a flag is no KEY=VALUE.
        RecipeError: The recipe is wrong.
        SafetyError: It holds something that looks like a secret.
        Problems: Several of these.
    """
    layers = read_layers(path, overrides)
    recipe, findings = _judge(layers.tree)
    if not layers.is_whole:
        findings = [f for f in findings if not f.is_missing]
    errors = _in_order(layers.errors, findings, str(path))
    raise_all(errors, file=str(path))
    assert recipe is not None, "a recipe without an error is a recipe"
    folder = absolute(path).parent
    return LoadedRecipe(
        recipe=recipe,
        folder=folder,
        file=str(path),
        digest=_digest(recipe),
        output=absolute(Path(output)) if output is not None else _run_folder(recipe, folder),
        _tree=layers.tree,
    )


def _judge(tree: Entry) -> tuple[Recipe | None, list[Finding]]:
    """The recipe, and everything that is wrong with it.

    One error hides others: a section with an unknown key is not compared with its neighbours. So what was found is
    mended (taken away, or filled in), the rest is judged again, and rules are asked that touch nothing mended.
    """
    from pydantic import ValidationError

    from lorafit.recipe.schema import Recipe

    touched = [path for path, entry in walk(tree) if entry.value is Unreadable.VALUE]
    findings: list[Finding] = []
    recipe = None
    for _ in range(_ROUNDS):
        try:
            recipe = Recipe.model_validate(plain(tree, recipe_outline()), strict=True)
            break
        except ValidationError as error:
            found = explain(error.errors(include_url=False), tree)
        known = {f.path for f in findings}
        findings += [f for f in found if f.path not in known and not _follows(f, touched)]
        touched += [f.meant for f in found if f.meant is not None and find(tree, f.meant) is None]
        for one in found:
            tree = _mended(tree, one)
            touched.append(one.path)
    if recipe is not None:
        for rule in disagreements(recipe):
            if not any(a[: len(b)] == b or b[: len(a)] == a for a in rule.paths for b in touched):
                findings.append(finding(tree, rule.paths[0], rule.what, rule.todo, is_missing=rule.is_missing))
    return (recipe if not findings else None), findings


def _follows(one: Finding, touched: Sequence[KeyPath]) -> bool:
    """Whether a finding only says that something is missing which was known to be wrong, and taken away."""
    if one.is_missing:
        return any(path[: len(one.path)] == one.path or one.path[: len(path)] == path for path in touched)
    return one.path in touched


def _mended(tree: Entry, one: Finding) -> Entry:
    """The tree with a stand-in for what is missing, or without what is wrong."""
    path = one.path
    if one.is_missing:
        above = find(tree, path[:-1])
        if above is None or not isinstance(above.value, dict):
            return tree
        stand_in: Any = {} if isinstance(slot_at(path, tree), Group) else "missing"
        return with_entry(tree, path, entry_of(stand_in, above.place))
    if path and path[-1] == "kind":
        path = path[:-1]
    while path and find(tree, path) is None:
        path = path[:-1]
    return with_entry(tree, path, None) if path else tree


def _in_order(of_text: Sequence[LorafitError], findings: Sequence[Finding], main: str) -> list[LorafitError]:
    """Refusals for safety first; then what the text says wrongly, what it means wrongly, and what it does not say.

    Within each as a reader meets them: the recipe, what it extends, the flags.
    """

    def order(ranked: tuple[int, LorafitError]) -> tuple[int, bool, str, int, int]:
        rank, error = ranked
        file = error.file or ""
        return (rank, file.startswith("--set "), "" if file == main else file, error.line or 0, error.column or 0)

    ranked = [(0 if isinstance(error, SafetyError) else 1, error) for error in of_text]
    ranked += [(3 if f.is_missing else 2, f.error) for f in findings]
    return [error for _, error in sorted(ranked, key=order)]


def _digest(recipe: Recipe) -> str:
    text = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _run_folder(recipe: Recipe, folder: Path) -> Path:
    """`output`, or `runs/NAME`; a name that would lead out of `runs` loses what leads it there."""
    if recipe.output:
        return absolute(folder / recipe.output)
    runs = folder / "runs"
    named = absolute(runs / recipe.name)
    if runs in named.parents:
        return named
    return runs / (re.sub(r"[/\\]+", "-", recipe.name).strip("-.") or "run")


def dump_recipe(loaded: LoadedRecipe, folder: Path) -> str:
    """The resolved recipe as YAML that `load_recipe` reads from `folder`: every default written out, paths relative."""
    values = loaded.recipe.model_dump(mode="json")
    tree = entry_of({**values, "output": ""}, Place(loaded.file))
    folder = absolute(folder)
    resolved = plain(moved(tree, loaded.folder, folder, absolute=True))
    resolved["output"] = Path(os.path.relpath(loaded.output, folder)).as_posix()
    return dump_yaml(resolved)
