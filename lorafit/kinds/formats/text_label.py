"""Texts with the classes that they belong to: `{"text": "...", "label": "spam"}`; a list of labels for several."""

from __future__ import annotations

from collections.abc import Mapping

from lorafit.contracts import Sample
from lorafit.errors import DataError
from lorafit.kinds.fields import Row, missing_field, read_filled_string, read_json_list, wrong_type
from lorafit.kinds.formats import Format, formats


@formats.register("text_label")
class TextLabel(Format):
    """A text and its label; numbers and truth values are names of labels too."""

    priority = 55
    fields: Mapping[str, bool] = {"text": True, "label": True}
    known_as: Mapping[str, tuple[str, ...]] = {
        "text": ("sentence", "content", "review", "comment", "message", "question", "body"),
        "label": ("labels", "class", "category", "target", "sentiment", "intent"),
    }
    verbatim = True

    def read(self, row: Row, file: str, line: int) -> Sample:
        """The text with its labels by name, in the row's order; a list may be empty: none of them applies."""
        text = read_filled_string(row, "text")
        if "label" not in row:
            raise missing_field("label", row)
        value = row["label"]
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = read_json_list(value, "label")
        values = value if isinstance(value, list) else [value]
        for one in values:
            if not isinstance(one, str | int) or one == "":
                raise wrong_type("label", "the name or number of a class, or a list of them", one)
        names = tuple(str(one).lower() if isinstance(one, bool) else str(one).strip() for one in values)
        if len(set(names)) < len(names):
            raise DataError("names a class twice", key="label")
        return Sample(file, line, text=text, labels=names)

    def read_prompt(self, row: Row, file: str, line: int) -> Sample:
        """The text alone, which is to be classified; a line of a txt file is one too."""
        asked = {"text": row["prompt"]} if "text" not in row and "prompt" in row else row
        return Sample(file, line, text=read_filled_string(asked, "text"), labels=())
