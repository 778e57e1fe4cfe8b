"""From a recipe file to a Recipe: every error at once, each with file, line, column, key and what to do."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafit.contracts import JsonMapping
from lorafit.errors import ModelError, RecipeError, UsageError, raise_all
from lorafit.recipe.cross_field_rules import disagreements
from lorafit.recipe.extends import read_layers
from lorafit.recipe.paths import absolute, moved
from lorafit.recipe.schema import Recipe
from lorafit.recipe.schema_tree import validate
from lorafit.recipe.yaml_tree import Entry, Place, entry_of, nearest_entry, parse_key, plain


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

    def place(self, key: str) -> Place:
        """Where a key stands: `error.named_at(key, *loaded.place(key))`.

        A key that was not written stands where the section around it does.
        """
        return nearest_entry(self._tree, parse_key(key)).at

    def path(self, text: str) -> Path:
        """A path of the recipe, absolute."""
        return self.folder / text


RECIPE_VALUES = "recipe"
"""What messages call a recipe that is no file but plain values. Its paths are relative to the working folder."""


def load_recipe(
    recipe: Path | JsonMapping,
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    flags_from: Path | None = None,
    look_at_template: Callable[[str | None, Path], None] | None = None,
) -> LoadedRecipe:
    """Reads a recipe with what it extends and the flags over it, and checks all of it.

    Args:
        recipe: Its file, or its values: what the YAML would hold.
        overrides: `KEY=VALUE` flags, e.g. `training.epochs=1` or `data.train[0].path=a.jsonl`.
        output: A run folder instead of the recipe's; relative to the working folder.
        flags_from: Folder that relative paths in `overrides` start from; the recipe's where None.
        look_at_template: Raises RecipeError or ModelError where what a recipe in a folder names is no chat template.
            What is wrong with it is told beside the recipe's other errors.

    Raises:
        UsageError: The file cannot be read, or a flag is no KEY=VALUE.
        RecipeError: The recipe is wrong.
        SafetyError: It holds something that looks like a secret.
        Problems: Several of these.
    """
    values = _plain_values(recipe) if isinstance(recipe, Mapping) else None
    path = Path(RECIPE_VALUES) if isinstance(recipe, Mapping) else recipe
    layers = read_layers(path, overrides, values, flags_from)
    valid = validate(layers.tree)
    if isinstance(valid, list) or layers.errors or disagreements(valid):
        from lorafit.recipe.all_errors import diagnose

        raise_all(diagnose(layers, str(path), absolute(path).parent, look_at_template), file=str(path))
        raise AssertionError("a recipe that is not valid has an error")
    folder = absolute(path).parent
    loaded = LoadedRecipe(
        recipe=valid,
        folder=folder,
        file=str(path),
        digest=_digest(valid),
        output=absolute(Path(output)) if output is not None else _run_folder(valid, folder),
        _tree=layers.tree,
    )
    if look_at_template is not None:
        try:
            look_at_template(valid.data.chat_template, folder)
        except (ModelError, RecipeError) as error:
            raise error.named_at(error.key or "", *loaded.place(error.key or "")) from None
    return loaded


def is_well_formed(recipe: Path | JsonMapping, overrides: Sequence[str]) -> bool:
    """Whether every single value is one that a recipe can have there, whatever others it disagrees with."""
    values = _plain_values(recipe) if isinstance(recipe, Mapping) else None
    layers = read_layers(Path(RECIPE_VALUES) if isinstance(recipe, Mapping) else recipe, overrides, values, None)
    return not layers.errors and not isinstance(validate(layers.tree), list)


def _plain_values(values: JsonMapping) -> Any:
    """A program's values as a file would hold them: paths as text, tuples as lists, keys as text."""
    try:
        return json.loads(json.dumps(values, default=os.fspath))
    except (TypeError, ValueError, RecursionError) as error:
        what = f"holds what no recipe can hold ({str(error).splitlines()[0]})"
        raise UsageError(what, file=RECIPE_VALUES, todo="use text, numbers, booleans, lists and dicts") from None


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
    from lorafit.recipe.reader import dump_yaml

    values = loaded.recipe.model_dump(mode="json")
    folder = absolute(folder)
    tree = entry_of({**values, "output": str(loaded.output)}, Place(loaded.file))
    return dump_yaml(plain(moved(tree, loaded.folder, folder, absolute=True)))
