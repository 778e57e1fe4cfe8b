"""Texts with the classes that they belong to: `{"text": "...", "label": "spam"}`; a list of labels for several.

A second text in `text_pair` is read together with the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from lorafit.contracts import Sample
from lorafit.errors import DataError
from lorafit.kinds.fields import Row, wrong_type
from lorafit.kinds.formats import formats
from lorafit.kinds.formats._labelled_text import TEXT_FIELDS, TEXT_KNOWN_AS, LabelledText, read_values


@formats.register("text_label")
class TextLabel(LabelledText):
    """A text, or two that belong together, and the label; numbers and truth values are names of labels too."""

    priority = 55
    fields: Mapping[str, bool] = {**TEXT_FIELDS, "label": True}
    rewordable = frozenset(TEXT_FIELDS)
    known_as: Mapping[str, tuple[str, ...]] = {
        **TEXT_KNOWN_AS,
        "label": ("labels", "class", "category", "target", "sentiment", "intent"),
    }
    unlabelled: ClassVar[Mapping[str, Any]] = {"labels": ()}

    def read(self, row: Row, file: str, line: int) -> Sample:
        """The text with its labels by name, in the row's order; a list may be empty: none of them applies."""
        sample = self.read_prompt(row, file, line)
        values = [int(one) if isinstance(one, float) and one.is_integer() else one for one in read_values(row, "label")]
        for one in values:
            if not isinstance(one, str | int) or one == "":
                raise wrong_type("label", "the name or number of a class, or a list of them", one)
        names = tuple(str(one).lower() if isinstance(one, bool) else str(one).strip() for one in values)
        if len(set(names)) < len(names):
            raise DataError("names a class twice", key="label")
        return replace(sample, labels=names)
