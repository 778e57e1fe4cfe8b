"""pydantic's errors in our words, each at the key, line and column that a reader has to mend.

`expectation` says what the schema expects at a key, for the reference as well; `mend` what to write instead of a value
that the key does not take: the first of some guesses that it does take.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from pydantic_core import ErrorDetails

from lorafit.console.wording import alternatives
from lorafit.errors import RecipeError
from lorafit.recipe.foreign import answer_to_kind, is_not_yet, means_nothing, parts_of, suggest_word
from lorafit.recipe.reader import read_scalar
from lorafit.recipe.schema import LARGEST_COUNT
from lorafit.recipe.schema_tree import (
    Node,
    fields_of,
    form_of,
    forms,
    is_nullable,
    kinds_of,
    node_at,
    section_of,
    sections_in,
    validate,
    words,
    written_path,
)
from lorafit.recipe.suggest import suggest_key
from lorafit.recipe.yaml_tree import (
    Entry,
    KeyPath,
    Place,
    Plain,
    entry_of,
    find,
    key_text,
    nearest_entry,
    plain,
    shown,
    with_entry,
)

_NAMES = {"string": "text", "integer": "a whole number", "number": "a number"}
_FORMATS = {"path": "a path", "path-or-name": "a path or a name"}
_PLURALS = {"string": "names", "integer": "whole numbers", "number": "numbers"}
_LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
}
_SHOWN_WORD_CHARACTERS = 40
_COMMA_NUMBER = re.compile(r"[-+]?\d+,\d+")
_RANGE_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}
_EMPTY_ERRORS = {"too_short", "string_too_short"}
_KIND_ERRORS = {"union_tag_invalid", "union_tag_not_found", "literal_error"}
_MAPPING = re.compile(r"\{\w+: [^{}]*\}")
_FIRST_WORD = re.compile(r"[a-z_0-9]+")


def expectation(node: Node) -> str:
    """What a node allows, in words: `a whole number or auto`, `one of drop, skip`, `a list of names among loss`."""
    kinds = kinds_of(node)
    short = [part for form in forms(node) if sections_in(form) for part in forms(form["items"])]  # of a list of one
    names = [name for form in forms(node) if form not in short for name in _form_names(form)]
    said = f"one of {', '.join(names)}" if len(names) > 2 else " or ".join(names)
    said = f"one of {', '.join(kinds)}, or a mapping with a kind" if kinds else said
    return f"{said} or null" if is_nullable(node) else said


def _form_names(form: Node) -> list[str]:
    """A form in words; a list of words is each of them."""
    kind = form.get("type")
    if kind == "boolean":
        return ["true", "false"]
    if kind == "object":
        keys = list(form.get("properties", ()))
        return [f"{{{keys[0]}: ...}}" if len(keys) == 1 else "a mapping"]
    if kind != "array":
        return words(form) or [_FORMATS.get(str(form.get("format")), _NAMES[str(kind)])]
    if sections_in(form):
        return ["a path, or a list of sources"]
    items = form.get("prefixItems", [form.get("items", {})])
    many = f"names among {', '.join(words(form))}" if words(form) else _PLURALS.get(items[0].get("type"), "values")
    return [f"a list of {len(items)} {many}" if "prefixItems" in form else f"a list of {many}"]


def allowed_range(node: Node | None, found: float = 0) -> str:
    """The limits on a number, e.g. `between 0 and 1`, `at least 1`; empty where there are none.

    Args:
        node: The schema of the number's key.
        found: The number. A limit that only keeps counters from overflowing is left out where it does not matter.
    """
    limited = [{name: form[name] for name in _LIMITS if name in form} for form in forms(node)]
    limits = next(filter(None, limited), {})
    if limits.get("maximum") == LARGEST_COUNT and found <= LARGEST_COUNT:
        del limits["maximum"]
    said = {name: f"{limit:.0f}" if float(limit).is_integer() else f"{limit:g}" for name, limit in limits.items()}
    if {"minimum", "maximum"} <= set(said):
        return f"between {said['minimum']} and {said['maximum']}"
    return " and ".join(f"{_LIMITS[name]} {said[name]}" for name in said)


def mend(path: KeyPath, node: Node | None, tree: Entry) -> str:
    """Advice on a value of the wrong type; empty where nothing better can be said than what is expected.

    Args:
        path: The key.
        node: The schema of the key.
        tree: The recipe as it was written.
    """
    entry = find(tree, path)
    if entry is None or node is None:
        return ""
    value = entry.value
    if value is False or means_nothing(value):
        whole = path[:-1] if isinstance(path[-1], int) else path
        for guess, text in (([], "[]"), (None, "null")):
            if takes(tree, whole, guess):
                is_default = (node_at(whole, tree) or {}).get("default", ...) == guess
                return f"leave it out, or write {text}" if is_default else f"write {text}"
    if value is None and any(form.get("type") in ("object", "array") for form in forms(node)):
        return "fill it in, or remove the key"
    held = plain(entry)
    if not isinstance(held, str | int | float | list):
        return ""
    advised = next((todo for todo, guess in _guesses(path, node, held) if takes(tree, path, guess)), "")
    near = _near_word(node, value) or _near_list(node, value) if isinstance(value, str) else ""
    return advised or near or _example(node)


def _example(node: Node) -> str:
    """The mappings that the reference shows of a section, or else its keys; empty for what is none."""
    section = form_of(node, None) if not kinds_of(node) else None
    keys = list((section or {}).get("properties", ()))
    if not keys or any(sections_in(form) for form in forms(node)):
        return ""
    shown_ones = _MAPPING.findall(node.get("description", ""))
    return f"write {alternatives(shown_ones)}" if shown_ones else f"its keys are {', '.join(keys)}"


def takes(tree: Entry, path: KeyPath, value: Plain) -> bool:
    """Whether the recipe would have no error at `path` or below it with that value there."""
    entry = find(tree, path)
    if entry is None:
        return False
    tried = with_entry(tree, path, entry_of(value, entry.place))
    found = validate(tried)
    wrong = [written_path(error["loc"], tried, is_missing=False) for error in found] if isinstance(found, list) else []
    return not any(one[: len(path)] == path for one in wrong)


def _guesses(path: KeyPath, node: Node, value: str | float | list[Plain]) -> Iterator[tuple[str, Plain]]:
    """What a word, number, boolean or list was perhaps meant to be, with the words that say so."""
    section = form_of(node, None) if not kinds_of(node) else None
    for key in (section or {}).get("properties", ()) if not isinstance(value, bool) else ():
        yield f"write {'' if len(forms(node)) > 1 else f'{path[-1]}: '}{{{key}: {value}}}", {key: value}
    if not isinstance(value, str):
        if not any(form.get("type") in ("object", "array") for form in forms(node)):
            yield "quote it", shown(value)
        if isinstance(value, float) and value.is_integer():
            yield f"write {int(value)}", int(value)
        return
    text, lists = value.strip(), [form for form in forms(node) if form.get("type") == "array"]
    if _COMMA_NUMBER.fullmatch(text):
        yield f"write {text.replace(',', '.')}", float(text.replace(",", "."))
    with suppress(RecipeError):
        read = read_scalar(text.lower() if text.lower() in ("true", "false") else text)
        if not isinstance(read, str):
            yield "remove the quotes", read
    names = parts_of(value)
    if lists and names and not means_nothing(value) and not _near_word(node, value):
        yield f"write [{', '.join(names)[:_SHOWN_WORD_CHARACTERS]}]", list[Plain](names)


def _near_word(node: Node, text: str) -> str:
    """The word that a text is near."""
    return suggest_word(text, [word for form in forms(node) if "items" not in form for word in words(form)]).rstrip()


def _near_list(node: Node, text: str) -> str:
    """The list of words that the parts of a text are near; empty where one of them is near none."""
    known = [word for form in forms(node) if "items" in form for word in words(form)]
    near = [suggest_word(name, known).removeprefix("did you mean ").partition("?")[0] for name in parts_of(text)]
    return f"did you mean [{', '.join(word.split(' or ')[0] for word in near)}]?" if near and all(near) else ""


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
        fields, kinds = fields_of(inner), kinds_of(inner)
        # a mapping from names to names (a source's columns) has keys of its own, which no name of ours answers
        for key, held in section.entries.items() if fields or kinds else ():
            if key in fields or (key == "kind" and kinds):
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
    if answer := answer_to_kind(family, named):
        what, _, todo = answer.partition("; ")
        return finding(tree, path, what, todo)
    if is_not_yet(family, named):
        return finding(tree, path, f"{family} {shown(named)} does not exist yet", known)
    return finding(tree, path, f"unknown {family} {shown(named)}", f"{suggest_word(named, kinds)}{known}")


def _said_by_validator(path: KeyPath, node: Node | None, text: str, tree: Entry) -> Finding:
    """A validator's own words, at the key of its section that they begin with."""
    word = _FIRST_WORD.match(text)
    if word is not None and word[0] in fields_of(node, find(tree, path)):
        path, text = (*path, word[0]), text.removeprefix(f"{word[0]}: ")
    what, _, todo = text.partition("; ")
    return finding(tree, path, what, todo or None)
