"""What an unknown key or word was meant to be: a misspelling, a key of another section, or another tool's name."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from lorafit.console.nearest import nearest
from lorafit.console.wording import alternatives
from lorafit.recipe.foreign import foreign_answer, value_of_ours
from lorafit.recipe.names import names_in_a_source
from lorafit.recipe.schema_tree import (
    Choice,
    Slot,
    every_key,
    fields_at,
    fields_of,
    kind_of,
    recipe_outline,
    variant_of,
)
from lorafit.recipe.yaml_tree import Entry, KeyPath, key_text

_MARK_OF_A_SOURCE = "subset"  # a key that sources of rows have, and no other section


@dataclass(frozen=True, slots=True)
class Answer:
    """What to say about an unknown key.

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


def answer_unknown_key(path: KeyPath, slot: Slot | None, section: Entry) -> Answer:
    """What to say about the key at `path`, which `section` (with the schema's `slot`) does not have.

    Asked in this order: the same name written differently, another tool's name, an option of another kind, a key of
    another section, the nearest name of this section, the nearest of all.
    """
    key, parent = str(path[-1]), path[:-1]
    unknown, folded = f"unknown key{_letters_that_deceive(key)}", _fold(key)
    fields = fields_at(slot, section) or {}
    choice = variant_of(slot, section)
    known = [*fields, *(["kind"] if isinstance(choice, Choice) else []), *([] if parent else ["extends"])]
    before_colon = folded.split(":")[0]
    if ":" in folded and before_colon in known:
        return Answer("no space behind the colon", f"write {before_colon}: value", (*parent, before_colon))
    if folded in known:
        return Answer(unknown, f"did you mean {folded}?", (*parent, folded))
    foreign = _foreign_name(folded, section, fields, parent)
    if foreign is not None:
        return foreign
    if isinstance(choice, Choice) and (others := _kinds_with(folded, choice)):
        what = f"unknown key; {kind_of(choice, section)} has no {folded}"
        return Answer(what, f"it belongs to {' and '.join(others[:3])}")
    if elsewhere := _keys_called(folded):
        return Answer("unknown key here", f"did you mean {_either(elsewhere)}?", elsewhere[0])
    if close := nearest(key, known, count=2):
        return Answer(unknown, f"did you mean {' or '.join(close)}?", (*parent, close[0]))
    if far := nearest(key, sorted({str(p[-1]) for p, _ in every_key(recipe_outline())}), count=1):
        elsewhere = _keys_called(far[0])
        return Answer(unknown, f"did you mean {_either(elsewhere)}?", elsewhere[0])
    return Answer(unknown, f"{'this section' if parent else 'a recipe'} has {', '.join(known)}")


def _fold(key: str) -> str:
    return unicodedata.normalize("NFKC", key).strip().lower().replace("-", "_")


def _foreign_name(folded: str, section: Entry, fields: Iterable[str], parent: KeyPath) -> Answer | None:
    ours = names_in_a_source().get(folded, "")
    if ours in fields and _MARK_OF_A_SOURCE in fields:
        held = section.value.get(str(folded)) if isinstance(section.value, dict) else None
        word = value_of_ours(("data", "train", ours), held.value) if held is not None else ""
        return Answer("unknown key", f"a source's key for this is {ours}{f': {word}' if word else ''}", (*parent, ours))
    answer = foreign_answer(folded, section)
    if answer is None:
        return None
    ours, note = answer
    if not ours:
        return Answer("unknown key", note)
    meant = tuple(ours.split("."))
    return Answer("unknown key", f"in lorafit this is {ours}{f' ({note})' if note else ''}", meant, is_foreign=True)


def _kinds_with(name: str, choice: Choice) -> list[str]:
    return [kind for kind, model in choice.kinds.items() if name in fields_of(model)]


def _keys_called(name: str) -> list[KeyPath]:
    """Every key of the schema with that last part; lists of sources are all alike, so the first speaks for them."""
    paths = list(dict.fromkeys(path for path, _ in every_key(recipe_outline())))
    sources = [path[:-1] for path in paths if path[-1] == _MARK_OF_A_SOURCE]
    return [path for path in paths if path[-1] == name and path[:-1] not in sources[1:]]


def _either(paths: list[KeyPath]) -> str:
    return alternatives([key_text(path) for path in paths[:3]])


def _letters_that_deceive(key: str) -> str:
    """Names a letter that only looks like a Latin one, or that cannot be seen."""
    odd = next((letter for letter in key if ord(letter) > 126 or not letter.isprintable()), None)
    if odd is None:
        return ""
    return f" (with {unicodedata.name(odd, f'U+{ord(odd):04X}')})"
