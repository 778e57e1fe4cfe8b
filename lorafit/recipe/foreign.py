"""Other tools' keys and words: `configs/foreign_names.yaml`, read when one that lorafit does not know is met."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from typing import TypedDict

from lorafit.console.nearest import nearest
from lorafit.machine.shipped import shipped
from lorafit.recipe.yaml_tree import Value

_FEWEST_KEYS = 3  # of one tool, by which a recipe is taken for that tool's

Answer = str | dict[bool | str, str]
"""Our key, and words behind `: ` that say what differs; or the words alone. By the value where that decides."""


class ForeignNames(TypedDict):
    """The tables of `configs/foreign_names.yaml`, whose comments say what each of them means."""

    anywhere: dict[str, Answer]
    in_a_source: dict[str, str]
    not_yet: dict[str, list[str]]
    kinds: dict[str, dict[str, str]]
    tools: dict[str, list[str]]
    words: dict[str, str]
    nothing: list[str]
    whole_step: dict[str, list[str]]
    quantization_by_key: dict[str, str]


@cache
def foreign() -> ForeignNames:
    """Reads `configs/foreign_names.yaml`, once."""
    import yaml

    names: ForeignNames = yaml.safe_load(shipped("foreign_names.yaml").read_text(encoding="utf-8"))
    return names


def fold(word: str) -> str:
    """A word as it is looked up: in lower case, its parts joined by `_`."""
    return re.sub(r"[\s_-]+", "_", unicodedata.normalize("NFKC", word).strip().lower())


def same_word(word: str, known: Iterable[str]) -> str:
    """The word among `known` that is `word`, written differently or as another tool has it; empty where none is."""
    known = list(known)
    words = foreign()["words"]
    ours = words.get(fold(word), words.get(word.strip().lower(), ""))
    return next((name for name in known if fold(name) == fold(word)), ours if ours in known else "")


def parts_of(text: str) -> list[str]:
    """The items of a list that was written as `a, b` or `a b`."""
    return [name for name in re.split(r"[\s,;]+", text.strip(" []")) if name]


def suggest_word(word: str, known: Iterable[str]) -> str:
    """`did you mean lora? ` for a word that is not among `known`, or nothing."""
    known = list(known)
    same = same_word(word, known)
    close = [same] if same else nearest(word.strip(), known, count=2)
    return f"did you mean {' or '.join(close)}? " if close else ""


def means_nothing(value: Value) -> bool:
    """Whether a text is one of the words by which people and other tools say that they want none."""
    return isinstance(value, str) and value.strip().lower() in foreign()["nothing"]


def is_not_yet(family: str, kind: str) -> bool:
    """Whether a kind is known of other tools and does not exist here yet, e.g. the adapter `dora`."""
    return fold(kind) in foreign()["not_yet"].get(family, ())


def answer_to_kind(family: str, name: str) -> str:
    """What a kind of that name is called here, where that takes more than another kind's name; empty where it does
    not."""
    return foreign()["kinds"].get(family, {}).get(fold(name), "").replace("NAME", fold(name))


def tool_of(keys: Iterable[str], ours: Iterable[str]) -> str | None:
    """The tool whose recipe has such keys; None where they do not tell, or as many are among `ours`."""
    held = set(keys)
    known = {tool: len(held & set(marks)) for tool, marks in foreign()["tools"].items()}
    tool = max(known, key=lambda name: known[name])
    least = max(_FEWEST_KEYS, 1 + len(held & set(ours) - set(foreign()["tools"][tool])))
    return tool if known[tool] >= least else None
