"""Words with a label each: `{"words": ["Ada", "lives", "here"], "labels": ["B-PER", "O", "O"]}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafit.contracts import Sample
from lorafit.errors import DataError
from lorafit.kinds.fields import Row, missing_field, read_filled_string, read_json_list, wrong_type
from lorafit.kinds.formats import Format, formats


@formats.register("word_labels")
class WordLabels(Format):
    """The words of a text and as many labels; numbers are names of labels too."""

    priority = 52
    fields: Mapping[str, bool] = {"words": True, "labels": True}
    known_as: Mapping[str, tuple[str, ...]] = {
        "words": ("tokens", "text", "sentence"),
        "labels": ("tags", "ner_tags", "ner", "pos_tags", "label"),
    }
    answer = "labels"
    form = ' as lists, in a table as JSON: ["Ada", "lives"]'
    verbatim = True

    def matches(self, row: Row) -> bool:
        """Whether both are lists, or hold one as text."""
        return all(_is_list(row.get(name)) for name in self.fields)

    def read(self, row: Row, file: str, line: int) -> Sample:
        """The words with their labels."""
        words, labels = _read_words(row), _read_list(row, "labels")
        for one in labels:
            if isinstance(one, bool) or not isinstance(one, str | int) or one == "":
                raise wrong_type("labels", "names or numbers of labels", one)
        if len(labels) != len(words):
            what = f"{len(labels)} labels for {len(words)} words"
            raise DataError(what, key="labels", todo="give each word one; O stands for none")
        return Sample(file, line, text=" ".join(words), words=words, labels=tuple(str(one).strip() for one in labels))

    def read_prompt(self, row: Row, file: str, line: int) -> Sample:
        """The words alone, whose labels are asked for; of a text, what blanks part."""
        if _is_list(row.get("words")):
            words = _read_words(row)
        else:
            named = next((name for name in ("words", "text", "prompt") if name in row), "words")
            words = tuple(read_filled_string(row, named).split())
        return Sample(file, line, text=" ".join(words), words=words, labels=())


def _is_list(value: object) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


def _read_list(row: Row, name: str) -> list[Any]:
    if name not in row:
        raise missing_field(name, row)
    value = row[name]
    if not _is_list(value):
        raise wrong_type(name, "list", value)
    return read_json_list(value, name) if isinstance(value, str) else list(value)


def _read_words(row: Row) -> tuple[str, ...]:
    words = _read_list(row, "words")
    if not words:
        raise DataError("is empty", key="words")
    for place, word in enumerate(words, 1):
        if not isinstance(word, str):
            raise wrong_type("words", "list of strings", word)
        if not word.strip():
            raise DataError(f"word {place} is blank", key="words", todo="leave it out, with its label")
    return tuple(word.strip() for word in words)
