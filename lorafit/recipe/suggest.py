"""What an unknown key was meant to be: a misspelling, a key of another section, or another tool's name."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from lorafit.console.nearest import nearest
from lorafit.console.wording import alternatives
from lorafit.recipe.foreign import fold, foreign
from lorafit.recipe.foreign_keys import foreign_answer, word_of_ours
from lorafit.recipe.schema_tree import Node, every_key, fields_of, kind_of, kinds_of, recipe_tree
from lorafit.recipe.yaml_tree import Entry, KeyPath, key_text

_MARK_OF_A_SOURCE = "subset"  # a key that sources of rows have, and no other section


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Advice on an unknown key.

    Attributes:
        what: What is wrong.
        todo: What to write instead.
        meant: The key that was very likely meant.
        is_foreign: Whether it is another tool's name for that.
    """

    what: str
    todo: str
    meant: KeyPath | None = None
    is_foreign: bool = False


def suggest_key(path: KeyPath, node: Node | None, section: Entry) -> Suggestion:
    """Advice on the key at `path`, which `section` (that may hold what `node` says) does not have.

    Asked in this order: the same name written differently, another tool's name, an option of another kind, a key of
    another section, the nearest name of this section, the nearest of all.
    """
    key, parent = str(path[-1]), path[:-1]
    unknown, folded = f"unknown key{_letters_that_deceive(key)}", fold(key)
    fields, kinds = fields_of(node, section), kinds_of(node)
    known = [*fields, *(["kind"] if kinds else []), *([] if parent else ["extends"])]
    before_colon, colon, _ = folded.partition(":")
    if colon and before_colon in known:
        return Suggestion("no space behind the colon", f"write {before_colon}: value", (*parent, before_colon))
    if folded in known:
        return Suggestion(unknown, f"did you mean {folded}?", (*parent, folded))
    foreign_key = _foreign_key(folded, section, fields, parent)
    if foreign_key is not None:
        return foreign_key
    others = [kind for kind, form in kinds.items() if folded in form["properties"]]
    if others:
        what = f"unknown key; {kind_of(node, section)} has no {folded}"
        return Suggestion(what, f"it belongs to {' and '.join(others[:3])}")
    if elsewhere := _keys_called(folded):
        return _elsewhere("unknown key here", elsewhere)
    if close := nearest(key, known, count=2):
        return Suggestion(unknown, f"did you mean {' or '.join(close)}?", (*parent, close[0]))
    if far := nearest(key, sorted({str(path[-1]) for path, _ in every_key(recipe_tree())}), count=1):
        return _elsewhere(unknown, _keys_called(far[0]))
    return Suggestion(unknown, f"{'this section' if parent else 'a recipe'} has {', '.join(known)}")


def _elsewhere(what: str, paths: list[KeyPath]) -> Suggestion:
    return Suggestion(what, f"did you mean {alternatives([key_text(path) for path in paths[:3]])}?", paths[0])


def _foreign_key(folded: str, section: Entry, fields: dict[str, Node], parent: KeyPath) -> Suggestion | None:
    ours = foreign()["in_a_source"].get(folded, "")
    if ours in fields and _MARK_OF_A_SOURCE in fields:
        held = section.entries.get(folded)
        word = word_of_ours(("data", "train", ours), held.value) if held is not None else ""
        todo = f"a source's key for this is {ours}{f': {word}' if word else ''}"
        return Suggestion("unknown key", todo, (*parent, ours))
    answer = foreign_answer(folded, section)
    if answer is None:
        return None
    ours, note = answer
    if not ours:
        return Suggestion("unknown key", note)
    todo = f"in lorafit this is {ours}{f' ({note})' if note else ''}"
    return Suggestion("unknown key", todo, tuple(ours.split(".")), is_foreign=True)


def _keys_called(name: str) -> list[KeyPath]:
    """Every key of the schema with that last part; lists of sources are all alike, so the first speaks for them."""
    paths = list(dict.fromkeys(path for path, _ in every_key(recipe_tree())))
    first, *others = (path[:-1] for path in paths if path[-1] == _MARK_OF_A_SOURCE)
    found = [path for path in paths if path[-1] == name]
    return [path for path in found if path[:-1] not in others or (*first, name) not in found]


def _letters_that_deceive(key: str) -> str:
    """Names a letter that only looks like a Latin one, or that cannot be seen."""
    odd = next((letter for letter in key if ord(letter) > 126 or not letter.isprintable()), None)
    return f" (with {unicodedata.name(odd, f'U+{ord(odd):04X}')})" if odd is not None else ""
