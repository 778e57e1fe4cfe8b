"""What an unknown key was meant to be: a misspelling, a key of another section, or another tool's name.

What another tool's key is called here is told with the value to write: by its own value, and by the keys beside it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from lorafit.console.nearest import nearest
from lorafit.console.wording import alternatives
from lorafit.recipe.foreign import fold, foreign, is_not_yet, means_nothing, parts_of, same_word
from lorafit.recipe.schema_tree import Node, every_key, fields_of, forms, kind_of, kinds_of, recipe_tree, words
from lorafit.recipe.yaml_tree import Entry, KeyPath, Value, key_text, parse_key, shown

_LONGEST_LIST_CHARACTERS = 60
_MARK_OF_A_SOURCE = "subset"  # a key that sources of rows have, and no other section


def foreign_answer(name: str, section: Entry) -> tuple[str, str] | None:
    """Our key, empty where there is none, and what else to say; None for a name that no other tool has.

    Args:
        name: The key, folded.
        section: What it stands in.
    """
    tables = foreign()
    answer = tables["anywhere"].get(name)
    if answer is None:
        return None
    values = {fold(key): entry.value for key, entry in section.entries.items()}
    value = values.get(name)
    if not isinstance(answer, str):
        answer = answer.get(fold(value) if isinstance(value, str) else value is not False, answer[True])
    ours, _, note = answer.partition(": ")
    if name in tables["quantization_by_key"]:
        note = _quantization_of(name, values)
    elif any(name in keys for keys in tables["whole_step"].values()):
        note = _whole_step(values)
    elif ours:
        note = word_of_ours(parse_key(ours), value) or note
    return ours, note


def word_of_ours(key: KeyPath, value: Value) -> str:
    """What to write at a key of ours for another tool's word; empty where the word says nothing to it.

    Args:
        key: Our key.
        value: What stands at theirs.
    """
    nodes = dict(reversed(list(every_key(recipe_tree()))))
    node = nodes.get(key[:-1] if key[-1] == "kind" else key)
    if not isinstance(value, str) or node is None:
        return ""
    known, lists = words(node), [form for form in forms(node) if form.get("type") == "array"]
    is_list = len(lists) == len(forms(node))
    if is_list and means_nothing(value):
        return "leave it out, or write []"
    theirs = parts_of(value)
    ours = [same_word(word, known) for word in theirs]
    if len(ours) == 1 and ours[0]:
        return f"[{ours[0]}]" if is_list else ours[0]
    if lists and len(theirs) > 1 and (all(ours) or not is_list):
        written = f"[{', '.join(our or word for our, word in zip(ours, theirs, strict=True))}]"
        return written if len(written) <= _LONGEST_LIST_CHARACTERS else ""
    family = str(key[-2] if key[-1] == "kind" else key[-1])
    return f"{shown(value)} does not exist yet" if kinds_of(node) and is_not_yet(family, value) else ""


def _quantization_of(name: str, values: Mapping[str, Value]) -> str:
    """Which kind the `load_in_*` keys of one section mean together."""
    kinds = foreign()["quantization_by_key"]
    said = next((key for key in kinds if values.get(key) not in (None, False)), None)
    if said is None:
        return "none"
    return kinds[said] if said == name else f"{kinds[said]}, by {said}"


def _whole_step(values: Mapping[str, Value]) -> str:
    """Examples of a whole optimizer step: what a device takes at once, times the steps that are accumulated."""
    keys = foreign()["whole_step"]
    batch, times = (next((key for key in keys[part] if key in values), None) for part in ("batch", "accumulation"))
    one, other = values.get(batch or ""), values.get(times or "")
    if type(one) is int and type(other) is int:
        said = f"{one * other}: {batch} {one} x {times} {other}, times the devices"
    elif times is None:
        said = f"{batch} x {keys['accumulation'][0]}, 1 where it is not said, x the devices"
    else:
        said = f"the batch of one device x {times} x the devices"
    return f"{said}; training.micro_batch_tokens cuts a step"


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
    if foreign_key is not None and foreign_key.meant != path:
        return foreign_key
    others = [kind for kind, form in kinds.items() if folded in form["properties"]]
    if others:
        return _of_another_kind(folded, others, node, section)
    if elsewhere := _keys_called(folded):
        return _elsewhere("unknown key here", elsewhere)
    if close := nearest(key, known, count=2):
        return Suggestion(unknown, f"did you mean {' or '.join(close)}?", (*parent, close[0]))
    if far := nearest(key, sorted({str(path[-1]) for path, _ in every_key(recipe_tree())}), count=1):
        return _elsewhere(unknown, _keys_called(far[0]))
    return Suggestion(unknown, f"{'this section' if parent else 'a recipe'} has {', '.join(known)}")


def _of_another_kind(option: str, others: list[str], node: Node | None, section: Entry) -> Suggestion:
    """Says which kinds have an option, the usual one first; of a kind named by a flag, how to replace the section."""
    usual, kind, named = kind_of(node, None), kind_of(node, section), section.entries.get("kind")
    first = sorted(others, key=lambda other: other != usual)
    shown_ones = [*first[:3], f"{len(first) - 3} more"] if len(first) > 3 else first
    todo = f"it belongs to {alternatives(shown_ones).replace(' or ', ' and ')}"
    flag, equals, word = named.place.file.partition("=") if named is not None else ("", "", "")
    if flag.endswith(".kind") and equals:
        todo = f"{todo}; {flag.removesuffix('.kind')}={word} replaces the whole section"
    return Suggestion(f"unknown key; {kind} has no {option}", todo)


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
