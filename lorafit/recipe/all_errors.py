"""Everything that is wrong with a recipe. Imported only for one that is not valid, so that a valid one does not pay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

from lorafit.errors import LorafitError, ModelError, RecipeError, SafetyError
from lorafit.recipe.cross_field_rules import Disagreement, disagreements
from lorafit.recipe.explain import Finding, explain, finding
from lorafit.recipe.extends import FLAG, Layers
from lorafit.recipe.names import tool_of
from lorafit.recipe.schema import Recipe
from lorafit.recipe.schema_tree import Group, plain, recipe_outline, slot_at
from lorafit.recipe.yaml_tree import Entry, KeyPath, Unreadable, entry_of, find, nearest_entry, walk, with_entry

_ROUNDS = 5
_TEMPLATE: KeyPath = ("data", "chat_template")


def diagnose(layers: Layers, main: str, look_at_template: Callable[[str], None] | None = None) -> list[LorafitError]:
    """Every error of a recipe, in the order in which they are said.

    One error hides others: a section with an unknown key is not compared with its neighbours. So what was found is
    mended (taken away, or filled in), the rest is judged again, and rules are asked that touch nothing mended.

    Args:
        layers: The recipe as it was written.
        main: What messages call the recipe's own file.
        look_at_template: Raises ModelError where a name is no chat template.
    """
    tree = layers.tree
    touched = [path for path, entry in walk(tree) if entry.value is Unreadable.VALUE]
    findings: list[Finding] = []
    for _ in range(_ROUNDS):
        judged = _judge(tree)
        if isinstance(judged, Recipe):
            findings += _contradictions(judged, tree, touched, main)
            break
        known = {one.path for one in findings}
        findings += [one for one in judged if one.path not in known and not _follows(one, touched)]
        touched += [one.meant for one in judged if one.meant is not None and find(tree, one.meant) is None]
        for one in judged:
            tree = _mended(tree, one)
            touched.append(one.path)
    findings += _of_template(layers.tree, [one.path for one in findings], look_at_template)
    if not layers.is_whole:  # what is missing may stand in what could not be read
        findings = [one for one in findings if not one.is_missing]
    listed = _in_order(layers.errors, findings, main)
    return [*_of_another_tool(layers.tree, main), *listed]


def _of_another_tool(tree: Entry, main: str) -> list[LorafitError]:
    """What a recipe is as a whole, where it has not our sections but keys of one other tool."""
    keys = {str(key) for key in tree.value} if isinstance(tree.value, dict) else set()
    tool = None if {"model", "data"} <= keys else tool_of(keys)
    if tool is None:
        return []
    todo = "write a new one (lorafit's docs/recipe.md has all keys); below, each key of this one is answered"
    return [RecipeError(f"looks like a recipe of {tool}, in which lorafit has other keys", file=main, todo=todo)]


def _judge(tree: Entry) -> Recipe | list[Finding]:
    try:
        return Recipe.model_validate(plain(tree, recipe_outline()), strict=True)
    except ValidationError as error:
        return explain(error.errors(include_url=False), tree)


def _of_template(
    tree: Entry, known: Sequence[KeyPath], look_at_template: Callable[[str], None] | None
) -> list[Finding]:
    """What is wrong with the chat template that a recipe names, where the key itself is right."""
    entry = find(tree, _TEMPLATE)
    if look_at_template is None or _TEMPLATE in known or entry is None or not isinstance(entry.value, str):
        return []
    try:
        look_at_template(entry.value)
    except (ModelError, RecipeError) as error:
        return [finding(tree, _TEMPLATE, error.what, error.todo)]
    return []


def _contradictions(recipe: Recipe, tree: Entry, touched: Sequence[KeyPath], main: str) -> list[Finding]:
    """The rules that a recipe breaks, those apart that ask about something mended."""
    return [
        _contradiction(rule, tree, main)
        for rule in disagreements(recipe)
        if not any(a[: len(b)] == b or b[: len(a)] == a for a in rule.paths for b in touched)
    ]


def _contradiction(rule: Disagreement, tree: Entry, main: str) -> Finding:
    """A broken rule. Of two keys of which one must go, that of the lower layer does: what was said last stays."""
    if not rule.is_one_of_two:
        return finding(tree, rule.paths[0], rule.what, rule.todo, is_missing=rule.is_missing)
    files = [nearest_entry(tree, path).at.file for path in rule.paths]
    layers = [2 if file.startswith(FLAG) else 1 if file == main else 0 for file in files]
    if layers[0] == layers[1]:
        return finding(tree, rule.paths[0], rule.what, rule.todo)
    lower = layers.index(min(layers))
    kept, other, (section, _, name) = rule.paths[1 - lower], rule.keys[lower], rule.keys[lower].rpartition(".")
    unset = f"add --set {other}=null" if 2 in layers else f"add {name}: null in {section}"
    return finding(tree, kept, f"{other} is set too, in {files[lower]}", f"{unset}, to keep this one")


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
        return (rank, file.startswith(FLAG), "" if file == main else file, error.line or 0, error.column or 0)

    ranked = [(0 if isinstance(error, SafetyError) else 1, error) for error in of_text]
    ranked += [(3 if f.is_missing else 2, f.error) for f in findings]
    return [error for _, error in sorted(ranked, key=order)]
