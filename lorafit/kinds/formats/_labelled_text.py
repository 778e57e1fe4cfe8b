"""What formats of a text with what is to be told of it share: the text, alone or with a second one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from lorafit.contracts import Sample
from lorafit.kinds.fields import Row, missing_field, read_filled_or_none, read_filled_string, read_json_list
from lorafit.kinds.formats import Format

TEXT_FIELDS: Mapping[str, bool] = {"text": True, "text_pair": False}
TEXT_KNOWN_AS: Mapping[str, tuple[str, ...]] = {
    "text": ("sentence1", "sentence", "premise", "content", "review", "comment", "message", "question", "body"),
    "text_pair": ("sentence2", "hypothesis", "text2", "question2"),
}


class LabelledText(Format):
    """A text, or two that are read together, and what is told of it in one more field."""

    rare = frozenset({"text_pair"})
    verbatim = True
    unlabelled: ClassVar[Mapping[str, Any]]
    """What a sample holds that is asked for its label."""

    def read_prompt(self, row: Row, file: str, line: int) -> Sample:
        """The text alone, of which something is asked; a line of a txt file is one too."""
        asked = {"text": row["prompt"]} if "text" not in row and "prompt" in row else row
        text, second = read_filled_string(asked, "text"), read_filled_or_none(asked, "text_pair")
        return replace(Sample(file, line, text=text, text_pair=second), **self.unlabelled)


def read_values(row: Row, field: str) -> list[Any]:
    """One value or several of a field; a table's cell may hold one, or a JSON list.

    Raises:
        MissingFieldError: The row lacks it.
        DataError: The cell begins like a list and is none.
    """
    if field not in row:
        raise missing_field(field, row)
    value = row[field]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = read_json_list(value, field)
    return value if isinstance(value, list) else [value]
