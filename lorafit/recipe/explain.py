"""pydantic's errors in our words, each at the key, line and column that a reader has to mend."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic_core import ErrorDetails

from lorafit.errors import RecipeError
from lorafit.recipe.expect import allowed_range, expectation
from lorafit.recipe.foreign import is_not_yet, suggest_word
from lorafit.recipe.mending import mend
from lorafit.recipe.schema_tree import (
    Node,
    fields_of,
    form_of,
    forms,
    kinds_of,
    node_at,
    node_below,
    section_of,
    sections_in,
    written_path,
)
from lorafit.recipe.suggest import suggest_key
from lorafit.recipe.yaml_tree import Entry, KeyPath, Place, find, key_text, nearest_entry, shown

_RANGE_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}
_EMPTY_ERRORS = {"too_short", "string_too_short"}
_KIND_ERRORS = {"union_tag_invalid", "union_tag_not_found", "literal_error"}
_FIRST_WORD = re.compile(r"[a-z_0-9]+")


@dataclass(frozen=True, slots=True)
class Finding:
    """One error of a recipe, with the key that it is about.

    Attributes:
        path: The key it is about.
        error: What is said.
        meant: The key that an unknown one was very likely meant to be; its absence is no error of its own then.
        is_missing: Whether what is wrong is that something is absent.
    """

    path: KeyPath
    error: RecipeError
    meant: KeyPath | None = None
    is_missing: bool = False


def finding(
    tree: Entry,
    path: KeyPath,
    what: str,
    todo: str | None = None,
    *,
    at: Place | None = None,
    meant: KeyPath | None = None,
    is_missing: bool = False,
) -> Finding:
    """Makes a finding about the key at `path`, where the tree has it, or else where the nearest section starts."""
    return Finding(path, (at or nearest_entry(tree, path).at).error(what, path, todo), meant, is_missing)


def explain(errors: Sequence[ErrorDetails], tree: Entry) -> list[Finding]:
    """Turns pydantic's errors into one finding a key; what several forms of a key said becomes one sentence.

    Args:
        errors: What pydantic found in the values of `tree`.
        tree: The recipe as it was written.
    """
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        path = written_path(error["loc"], tree, is_missing=error["type"] == "missing")
        if path[-1:] == ("kind",) and kinds_of(node_at(path[:-1], tree)):
            path = path[:-1]
        by_path.setdefault(path, []).append(error)
    above = {path[:length] for path in by_path for length in range(len(path))}  # one form's errors lie deeper
    found = [one for path, held in by_path.items() if path not in above for one in _explain_key(path, held, tree)]
    meant = {one.meant for one in found if one.meant is not None}
    return [one for one in found if not (one.is_missing and any(key[: len(one.path)] == one.path for key in meant))]


def _explain_key(path: KeyPath, errors: list[ErrorDetails], tree: Entry) -> list[Finding]:
    kinds, node, entry = {error["type"] for error in errors}, node_at(path, tree), find(tree, path)
    said = next((error["msg"] for error in errors if error["type"] == "value_error"), None)
    if "extra_forbidden" in kinds:
        return list(_unknown_key(path, node_at(path[:-1], tree), tree))
    if "missing" in kinds:
        return [_missing(path, node, tree)]
    if kinds & _KIND_ERRORS and kinds_of(node):
        return [_unknown_kind(path, list(kinds_of(node)), tree)]
    if said is not None:
        return [_said_by_validator(path, node, said.removeprefix("Value error, "), tree)]
    value = entry.value if entry is not None else None
    if kinds & _RANGE_ERRORS and isinstance(value, int | float):
        return [finding(tree, path, f"must be {allowed_range(node, value)} (allowed range), found {shown(value)}")]
    wanted = expectation(node) if node is not None else errors[0]["msg"].lower()
    if kinds & _EMPTY_ERRORS and value in ("", ()):
        return [finding(tree, path, f"must not be empty, expected {wanted}")]
    return [finding(tree, path, f"expected {wanted}, found {shown(entry)}", mend(path, node, tree) or None)]


def _unknown_key(path: KeyPath, node: Node | None, tree: Entry) -> Iterator[Finding]:
    """What to say about a key that its section, which may hold what `node` says, does not have.

    Of another tool's section that is one of ours by another name, each key is answered too.
    """
    entry, section = find(tree, path), find(tree, path[:-1])
    if entry is None or section is None:
        return
    said = suggest_key(path, node, section)
    yield finding(tree, path, said.what, said.todo, at=entry.key_place, meant=said.meant)
    if said.is_foreign and said.meant is not None:
        yield from _keys_inside(path, entry, said.meant, tree)


def _keys_inside(path: KeyPath, entry: Entry, ours: KeyPath, tree: Entry) -> Iterator[Finding]:
    """What to say about each key of another tool's section, or list of sections, that `ours` is called here."""
    node: Node | None = node_at(ours, tree)
    if isinstance(entry.value, tuple):
        inner = next((form["items"] for form in forms(node) if sections_in(form)), None)
        sections = [((*path, n), (*ours, n), item) for n, item in enumerate(entry.value)] if inner else []
    else:
        inner, sections = node if form_of(node, None) else None, [(path, ours, entry)]
    for where, here, section in sections:
        fields = fields_of(inner)
        for key, held in section.entries.items() if inner else ():
            if key in fields or (key == "kind" and kinds_of(inner)):
                todo = f"did you mean {key_text((*here, key))}?"
                yield finding(tree, (*where, key), "unknown key here", todo, at=held.key_place)
            else:
                yield from _unknown_key((*where, key), inner, tree)


def _missing(path: KeyPath, node: Node | None, tree: Entry) -> Finding:
    section, above = path[:-1], nearest_entry(tree, path[:-1])
    if isinstance(path[-1], int):
        wanted = expectation(node_at(section, tree) or {})
        return finding(tree, section, f"expected {wanted}, found {shown(above)}")
    needed = (section_of(node) or {}).get("required", ())
    example = f"{{{', '.join(f'{name}: …' for name in needed)}}}" if needed else expectation(node or {})
    return finding(tree, path, "is missing", f"add {path[-1]}: {example}", at=above.at, is_missing=True)


def _unknown_kind(path: KeyPath, kinds: list[str], tree: Entry) -> Finding:
    entry, family, known = find(tree, path), str(path[-1]), f"available: {', '.join(kinds)}"
    if entry is not None and "kind" in entry.entries:
        path = (*path, "kind")
        entry = entry.entries["kind"]
    named = entry.value if entry is not None else None
    if not isinstance(named, str):
        return finding(tree, path, f"expected the name of a kind, found {shown(entry)}", known)
    if family == "adapter" and named.strip().lower() == "qlora":
        return finding(tree, path, "QLoRA is adapter: lora on a quantised base", "add model: {quantization: nf4}")
    if is_not_yet(family, named):
        return finding(tree, path, f"{family} {shown(named)} does not exist yet", known)
    return finding(tree, path, f"unknown {family} {shown(named)}", f"{suggest_word(named, kinds)}{known}")


def _said_by_validator(path: KeyPath, node: Node | None, text: str, tree: Entry) -> Finding:
    """A validator's own words, at the key of its section that they begin with."""
    word = _FIRST_WORD.match(text)
    if word is not None and node_below(node, find(tree, path), word[0]) is not None:
        path = (*path, word[0])
    what, _, todo = text.partition("; ")
    return finding(tree, path, what, todo or None)
