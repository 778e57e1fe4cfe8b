"""Texts with what is to be predicted of them as a number: `{"text": "...", "score": 3.5}`; a list for several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from lorafit.contracts import Sample
from lorafit.kinds.fields import Row, as_number
from lorafit.kinds.formats import formats
from lorafit.kinds.formats._labelled_text import TEXT_FIELDS, TEXT_KNOWN_AS, LabelledText, read_values

_EXPECTED = "a number, or a list of them"


@formats.register("text_score")
class TextScore(LabelledText):
    """A text, or two, and a number; only a task that predicts numbers asks for it before plain text."""

    priority = 65
    fields: Mapping[str, bool] = {**TEXT_FIELDS, "score": True}
    rewordable = frozenset(TEXT_FIELDS)
    known_as: Mapping[str, tuple[str, ...]] = {
        **TEXT_KNOWN_AS,
        "score": ("label", "rating", "stars", "similarity", "similarity_score", "target", "value", "grade"),
    }
    unlabelled: ClassVar[Mapping[str, Any]] = {"numbers": ()}

    def read(self, row: Row, file: str, line: int) -> Sample:
        """The text with its numbers, in the row's order."""
        sample = self.read_prompt(row, file, line)
        return replace(sample, numbers=tuple(as_number(one, "score", _EXPECTED) for one in read_values(row, "score")))
