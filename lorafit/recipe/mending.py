"""What to write instead of a value that a key does not take: the first of some guesses that it does take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress

from lorafit.recipe.foreign import means_nothing, suggest_word
from lorafit.recipe.scalars import UnclearScalarError, read_scalar
from lorafit.recipe.schema_tree import Node, form_of, forms, kinds_of, node_at, validate, words, written_path
from lorafit.recipe.yaml_tree import Entry, KeyPath, Plain, entry_of, find, shown, with_entry

_SHOWN_WORD_CHARACTERS = 40
_COMMA_NUMBER = re.compile(r"[-+]?\d+,\d+")


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
    if not isinstance(value, str | int | float):
        return ""
    advised = next((todo for todo, guess in _guesses(path, node, value) if takes(tree, path, guess)), "")
    return advised or (_near_word(node, value) or _near_list(node, value) if isinstance(value, str) else "")


def takes(tree: Entry, path: KeyPath, value: Plain) -> bool:
    """Whether the recipe would have no error at `path` or below it with that value there."""
    entry = find(tree, path)
    if entry is None:
        return False
    tried = with_entry(tree, path, entry_of(value, entry.place))
    found = validate(tried)
    wrong = [written_path(error["loc"], tried, is_missing=False) for error in found] if isinstance(found, list) else []
    return not any(one[: len(path)] == path for one in wrong)


def _guesses(path: KeyPath, node: Node, value: str | float) -> Iterator[tuple[str, Plain]]:
    """What a word, number or boolean was perhaps meant to be, with the words that say so."""
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
    with suppress(UnclearScalarError):
        read = read_scalar(text.lower() if text.lower() in ("true", "false") else text)
        if not isinstance(read, str):
            yield "remove the quotes", read
    names = _parts(value)
    if lists and names and not means_nothing(value) and not _near_word(node, value):
        yield f"write [{', '.join(names)[:_SHOWN_WORD_CHARACTERS]}]", list[Plain](names)


def _parts(text: str) -> list[str]:
    """The items of a list that was written as `a, b` or `a b`."""
    return [name for name in re.split(r"[\s,;]+", text.strip(" []")) if name]


def _near_word(node: Node, text: str) -> str:
    """The word that a text is near."""
    return suggest_word(text, [word for form in forms(node) if "items" not in form for word in words(form)]).rstrip()


def _near_list(node: Node, text: str) -> str:
    """The list of words that the parts of a text are near; empty where one of them is near none."""
    known = [word for form in forms(node) if "items" in form for word in words(form)]
    near = [suggest_word(name, known).removeprefix("did you mean ").partition("?")[0] for name in _parts(text)]
    return f"did you mean [{', '.join(word.split(' or ')[0] for word in near)}]?" if near and all(near) else ""
