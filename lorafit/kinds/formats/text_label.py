"""Texts with the classes that they belong to: `{"text": "...", "label": "spam"}`; a list of labels for several.

A second text in `text_pair` is read together with the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lorafit.contracts import Sample
from lorafit.errors import DataError
from lorafit.kinds.fields import (
    Row,
    missing_field,
    read_filled_or_none,
    read_filled_string,
    read_json_list,
    wrong_type,
)
from lorafit.kinds.formats import Format, formats


@formats.register("text_label")
class TextLabel(Format):
    """A text, or two that belong together, and the label; numbers and truth values are names of labels too."""

    priority = 55
    fields: Mapping[str, bool] = {"text": True, "text_pair": False, "label": True}
    known_as: Mapping[str, tuple[str, ...]] = {
        "text": ("sentence1", "sentence", "premise", "content", "review", "comment", "message", "question", "body"),
        "text_pair": ("sentence2", "hypothesis", "text2", "question2"),
        "label": ("labels", "class", "category", "target", "sentiment", "intent"),
    }
    rare = frozenset({"text_pair"})
    verbatim = True

    def read(self, row: Row, file: str, line: int) -> Sample:
        """The text with its labels by name, in the row's order; a list may be empty: none of them applies."""
        sample = self.read_prompt(row, file, line)
        if "label" not in row:
            raise missing_field("label", row)
        value = row["label"]
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = read_json_list(value, "label")
        values = value if isinstance(value, list) else [value]
        values = [int(one) if isinstance(one, float) and one.is_integer() else one for one in values]
        for one in values:
            if not isinstance(one, str | int) or one == "":
                raise wrong_type("label", "the name or number of a class, or a list of them", one)
        names = tuple(str(one).lower() if isinstance(one, bool) else str(one).strip() for one in values)
        if len(set(names)) < len(names):
            raise DataError("names a class twice", key="label")
        return replace(sample, labels=names)

    def read_prompt(self, row: Row, file: str, line: int) -> Sample:
        """The text alone, which is to be classified; a line of a txt file is one too."""
        asked = {"text": row["prompt"]} if "text" not in row and "prompt" in row else row
        text, second = read_filled_string(asked, "text"), read_filled_or_none(asked, "text_pair")
        return Sample(file, line, text=text, text_pair=second, labels=())
