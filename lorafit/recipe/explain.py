"""pydantic's errors in our words, each at the key, line and column that a reader has to mend."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import ErrorDetails

from lorafit.errors import RecipeError
from lorafit.recipe.expect import allowed_range, expectation
from lorafit.recipe.mending import mend
from lorafit.recipe.names import is_not_yet
from lorafit.recipe.schema_tree import Choice, Group, Items, Slot, Variants, fields_at, real_path, slot_at
from lorafit.recipe.suggest import answer_unknown_key
from lorafit.recipe.words import suggest_word
from lorafit.recipe.yaml_tree import Entry, KeyPath, find, key_text, nearest_entry, parse_key, shown

_RANGE_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}
_EMPTY_ERRORS = {"too_short", "string_too_short"}
_NAMED_KEY = re.compile(r"([a-z_0-9]+(?:\.[a-z_0-9]+|\[\d+\])*): (.+)", re.DOTALL)
_FIRST_WORD = re.compile(r"[a-z_0-9]+")


@dataclass(frozen=True, slots=True)
class Finding:
    """One error of the recipe.

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


def finding(tree: Entry, path: KeyPath, what: str, todo: str | None = None, *, is_missing: bool = False) -> Finding:
    """A finding about the key at `path`, placed where the tree has it, or else where the nearest section starts."""
    entry = nearest_entry(tree, path)
    error = RecipeError(what, **entry.at.known, key=key_text(path) or None, todo=todo)
    return Finding(path, error, is_missing=is_missing)


def explain(errors: Sequence[ErrorDetails], tree: Entry) -> list[Finding]:
    """One finding a key; what several branches of a union said about it becomes one sentence.

    Args:
        errors: What pydantic found in the values of `tree`.
        tree: The recipe as it was written.
    """
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    slots: dict[KeyPath, Slot | None] = {}
    for error in errors:
        path, slot = real_path(error["loc"], tree)
        by_path.setdefault(path, []).append(error)
        slots[path] = slot
    found = [one for path, group in by_path.items() for one in _explain_key(path, slots[path], group, tree)]
    meant = {f.meant for f in found if f.meant is not None}
    return [f for f in found if not (f.is_missing and any(m[: len(f.path)] == f.path for m in meant))]


def _explain_key(path: KeyPath, slot: Slot | None, errors: list[ErrorDetails], tree: Entry) -> list[Finding]:
    if any(error["type"] == "extra_forbidden" for error in errors):
        return _unknown_key(path, slot_at(path[:-1], tree), tree)
    return [_explain_one(path, slot, errors, tree)]


def _unknown_key(path: KeyPath, slot: Slot | None, tree: Entry) -> list[Finding]:
    """What to say about a key that its section (with the schema's `slot`) does not have.

    Of another tool's section that is one of ours by another name, each key is answered too.
    """
    answer = answer_unknown_key(path, slot, find(tree, path[:-1]) or tree)
    placed, entry = nearest_entry(tree, path), find(tree, path)
    where = placed.key_place if entry is not None else placed.at
    error = RecipeError(answer.what, **where.known, key=_short(key_text(path)), todo=answer.todo)
    found = [Finding(path, error, answer.meant)]
    if answer.is_foreign and answer.meant is not None and entry is not None:
        found += _keys_inside(path, entry, answer.meant, tree)
    return found


def _keys_inside(path: KeyPath, entry: Entry, ours: KeyPath, tree: Entry) -> list[Finding]:
    """What to say about each key of another tool's section, or list of sections, that `ours` is called here."""
    slot = slot_at(ours, tree)
    forms: list[Slot | None] = list(slot.forms.values()) if isinstance(slot, Variants) else [slot]
    sections = {path: entry}
    if isinstance(entry.value, tuple):
        sections = {(*path, number): item for number, item in enumerate(entry.value)}
        forms = [form.item for form in forms if isinstance(form, Items)]
    found = []
    for inner in (form for form in forms if isinstance(form, Group | Choice)):
        fields = fields_at(inner, None) or {}
        for where, section in sections.items():
            here = (*ours, where[-1]) if section is not entry else ours
            for key, held in section.value.items() if isinstance(section.value, dict) else ():
                if key in fields or (key == "kind" and isinstance(inner, Choice)):
                    at, todo = held.key_place.known, f"did you mean {key_text((*here, key))}?"
                    error = RecipeError("unknown key here", **at, key=_short(key_text((*where, key))), todo=todo)
                    found.append(Finding((*where, key), error))
                else:
                    found += _unknown_key((*where, key), inner, tree)
    return found


def _explain_one(path: KeyPath, slot: Slot | None, errors: list[ErrorDetails], tree: Entry) -> Finding:
    kinds = {error["type"] for error in errors}
    entry = find(tree, path)
    first = errors[0]
    if "missing" in kinds:
        return _missing(path, slot, tree)
    if isinstance(slot, Choice) and kinds & {"union_tag_invalid", "union_tag_not_found", "literal_error"}:
        return _unknown_kind(path, slot, entry, tree)
    value_errors = [error for error in errors if error["type"] in ("value_error", "assertion_error")]
    if value_errors:
        return _said_by_validator(path, slot, value_errors[0]["msg"], tree)
    value = entry.value if entry is not None else first.get("input")
    if kinds & _RANGE_ERRORS and isinstance(value, int | float) and not isinstance(value, bool):
        return finding(tree, path, f"must be {allowed_range(slot, value)} (allowed range), found {shown(value)}")
    if kinds & _EMPTY_ERRORS and value in ("", (), []):
        return finding(tree, path, f"must not be empty, expected {expectation(slot)}")
    return _wrong_type(path, slot, value, errors, tree)


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:99]}…"


def _missing(path: KeyPath, slot: Slot | None, tree: Entry) -> Finding:
    above = nearest_entry(tree, path[:-1])
    if isinstance(path[-1], int):
        above_slot = slot_at(path[:-1], tree)
        return finding(tree, path[:-1], f"expected {expectation(above_slot)}, found {shown(above)}")
    needed = [name for name, field in (fields_at(slot, None) or {}).items() if field.required]
    todo = f"add {path[-1]}: " + (f"{{{', '.join(f'{name}: …' for name in needed)}}}" if needed else expectation(slot))
    error = RecipeError("is missing", **above.at.known, key=key_text(path), todo=todo)
    return Finding(path, error, is_missing=True)


def _unknown_kind(path: KeyPath, slot: Choice, entry: Entry | None, tree: Entry) -> Finding:
    value = entry.value if entry is not None else None
    if isinstance(value, dict) and "kind" in value:
        path, named = (*path, "kind"), value["kind"].value
    else:
        named = value
    what = str(path[-2] if path[-1] == "kind" else path[-1])
    known = f"available: {', '.join(slot.kinds)}"
    if not isinstance(named, str):
        if isinstance(named, dict):
            return finding(tree, path, "names no kind", f"add kind; {known}")
        return finding(tree, path, f"expected the name of a kind, found {shown(named)}", known)
    if what == "adapter" and named.strip().lower() == "qlora":
        return finding(tree, path, "QLoRA is adapter: lora on a quantised base", "add model: {quantization: nf4}")
    if is_not_yet(what, named):
        return finding(tree, path, f"{what} {shown(named)} does not exist yet", known)
    return finding(tree, path, f"unknown {what} {shown(named)}", f"{suggest_word(named, slot.kinds)}{known}")


def _said_by_validator(path: KeyPath, slot: Slot | None, message: str, tree: Entry) -> Finding:
    """A validator's own words. It may start with the key it means, relative to its section or from the top."""
    text = message.split(", ", 1)[1] if message.startswith(("Value error, ", "Assertion failed, ")) else message
    named = _NAMED_KEY.fullmatch(text)
    if named is not None:
        key = parse_key(named[1])
        for candidate in ((*path, *key), key):
            if _is_known(candidate, tree):
                path, text = candidate, named[2]
                break
    else:
        entry = find(tree, path)
        word = _FIRST_WORD.match(text)
        fields = fields_at(slot, entry) if entry is not None else None
        if fields is not None and word is not None and word[0] in fields:
            path = (*path, word[0])
    what, _, todo = text.partition("; ")
    return finding(tree, path, what, todo or None)


def _is_known(path: KeyPath, tree: Entry) -> bool:
    return slot_at(path, tree) is not None


def _wrong_type(path: KeyPath, slot: Slot | None, value: Any, errors: Sequence[ErrorDetails], tree: Entry) -> Finding:
    wanted = expectation(slot) if slot is not None else errors[0]["msg"].lower()
    return finding(tree, path, f"expected {wanted}, found {shown(value)}", mend(path, slot, value, tree) or None)
