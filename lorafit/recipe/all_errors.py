"""Everything that is wrong with a recipe. Imported only for one that is not valid, so that a valid one does not pay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import eq
from pathlib import Path

from lorafit.errors import LorafitError, ModelError, RecipeError, SafetyError
from lorafit.recipe.cross_field_rules import Disagreement, disagreements
from lorafit.recipe.explain import Finding, explain, finding
from lorafit.recipe.extends import FLAG, Layers
from lorafit.recipe.foreign import tool_of
from lorafit.recipe.schema_tree import fields_of, node_at, recipe_tree, section_of, validate
from lorafit.recipe.yaml_tree import (
    Entry,
    KeyPath,
    Unreadable,
    entry_of,
    find,
    nearest_entry,
    overlap,
    walk,
    with_entry,
)

_ROUNDS = 5
_MOST_ERRORS = 400
_TEMPLATE: KeyPath = ("data", "chat_template")


def diagnose(
    layers: Layers, main: str, folder: Path, look_at_template: Callable[[str | None, Path], None] | None
) -> list[LorafitError]:
    """Finds every error of a recipe, in the order in which they are printed.

    One error hides others: a section with an unknown key is not compared with its neighbours. So what was found is
    mended (taken away, or filled in), the rest is judged again, and rules are asked that touch nothing mended.

    Args:
        layers: The recipe as it was written.
        main: What messages call the recipe's own file.
        folder: Where that lies.
        look_at_template: Raises where what a recipe in a folder names is no chat template.
    """
    tree, findings = layers.tree, list[Finding]()
    touched = [path for path, entry in walk(tree) if entry.value is Unreadable.VALUE]
    for _ in range(_ROUNDS):
        judged = validate(tree)
        if not isinstance(judged, list):
            for rule in disagreements(judged):
                if not any(overlap(path, other) for path in rule.paths for other in touched):
                    findings.append(_contradiction(rule, tree, main))
            break
        if len(judged) > _MOST_ERRORS:
            findings.append(finding(tree, (), f"more than {_MOST_ERRORS} errors", "mend the first ones"))
        found = explain(judged[:_MOST_ERRORS], tree)
        for one in found:  # known before, or only missing because what was wrong there is taken away
            hides = overlap if one.is_missing else eq
            findings += [] if any(hides(path, one.path) for path in touched) else [one]
        touched += [one.meant for one in found if one.meant is not None and find(tree, one.meant) is None]
        touched += [one.path for one in found]
        for one in found:
            tree = _mended(tree, one)
        if len(judged) > _MOST_ERRORS:
            break
    named = find(layers.tree, _TEMPLATE)
    if look_at_template is not None and named is not None and isinstance(named.value, str):
        try:
            look_at_template(named.value, folder)
        except (ModelError, RecipeError) as error:
            if not any(one.path == _TEMPLATE for one in findings):
                findings.append(finding(layers.tree, _TEMPLATE, error.what, error.todo))
    if not layers.is_whole:  # what is missing may stand in what could not be read
        findings = [one for one in findings if not one.is_missing]
    errors, keys = _in_order(layers.errors, findings, main), layers.tree.entries
    if not {"model", "data"} <= set(keys) and (tool := tool_of(keys, fields_of(recipe_tree()))) is not None:
        todo = "write a new one (lorafit's docs/recipe.md has all keys); below, each key of this one is answered"
        what = f"looks like a recipe of {tool}, in which lorafit has other keys"
        errors.insert(0, RecipeError(what, file=main, todo=todo))
    return errors


def _contradiction(rule: Disagreement, tree: Entry, main: str) -> Finding:
    """A broken rule. Of two keys of which one must go, that of the lower layer does: what was said last stays."""
    files = [nearest_entry(tree, path).at.file for path in rule.paths]
    layers = [2 if file.startswith(FLAG) else 1 if file == main else 0 for file in files]
    if not rule.is_one_of_two or layers[0] == layers[1]:
        return finding(tree, rule.paths[0], rule.what, rule.todo, is_missing=rule.is_missing)
    lower = layers.index(min(layers))
    kept, other, (section, _, name) = rule.paths[1 - lower], rule.keys[lower], rule.keys[lower].rpartition(".")
    unset = f"add --set {other}=null" if 2 in layers else f"add {name}: null in {section}"
    return finding(tree, kept, f"{other} is set too, in {files[lower]}", f"{unset}, to keep this one")


def _mended(tree: Entry, one: Finding) -> Entry:
    """The tree with a stand-in for what is missing, or without what is wrong."""
    path = one.path
    if one.is_missing:
        above = find(tree, path[:-1])
        if above is None or not isinstance(above.value, dict):
            return tree
        return with_entry(tree, path, entry_of({} if section_of(node_at(path, tree)) else "missing", above.place))
    if path[-1:] == ("kind",):
        path = path[:-1]
    while path and find(tree, path) is None:
        path = path[:-1]
    above = find(tree, path[:-1]) if path else None
    if above is not None and _is_left_empty(path[:-1], above, tree):  # what is left would be blamed for being empty
        path = path[:-1]
    return with_entry(tree, path, None) if path else tree


def _is_left_empty(path: KeyPath, entry: Entry, tree: Entry) -> bool:
    """Whether an entry is a list, or a mapping of free names, that has one item."""
    held = entry.value
    return isinstance(held, dict | tuple) and len(held) == 1 and not fields_of(node_at(path, tree), entry)


def _in_order(of_text: Sequence[LorafitError], findings: Sequence[Finding], main: str) -> list[LorafitError]:
    """Sorts errors: refusals for safety; what the text says wrongly; what it means wrongly; what it does not say.

    Within each as a reader meets them: the recipe, what it extends, the flags.
    """

    def order(ranked: tuple[int, LorafitError]) -> tuple[int, bool, str, int, int]:
        rank, error = ranked
        file = error.file or ""
        return (rank, file.startswith(FLAG), "" if file == main else file, error.line or 0, error.column or 0)

    ranked = [(0 if isinstance(error, SafetyError) else 1, error) for error in of_text]
    ranked += [(3 if one.is_missing else 2, one.error) for one in findings]
    return [error for _, error in sorted(ranked, key=order)]
