"""Texts with what is to be predicted of them as a number: `{"text": "...", "score": 3.5}`; a list for several."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from lorafit.contracts import Sample
from lorafit.kinds.fields import Row, wrong_type
from lorafit.kinds.formats import formats
from lorafit.kinds.formats._labelled_text import TEXT_FIELDS, TEXT_KNOWN_AS, LabelledText, read_values

_COMMA_NUMBER = re.compile(r"[-+]?\d+,\d+")


@formats.register("text_score")
class TextScore(LabelledText):
    """A text, or two, and a number; only a task that predicts numbers asks for it before plain text."""

    priority = 65
    fields: Mapping[str, bool] = {**TEXT_FIELDS, "score": True}
    known_as: Mapping[str, tuple[str, ...]] = {
        **TEXT_KNOWN_AS,
        "score": ("label", "rating", "stars", "similarity", "similarity_score", "target", "value", "grade"),
    }
    unlabelled: ClassVar[Mapping[str, Any]] = {"numbers": ()}

    def read(self, row: Row, file: str, line: int) -> Sample:
        """The text with its numbers, in the row's order."""
        sample = self.read_prompt(row, file, line)
        return replace(sample, numbers=tuple(_number(one) for one in read_values(row, "score")))


def _number(value: object) -> float:
    """A finite number, or what a table's cell writes of one."""
    if isinstance(value, str):
        written = value.strip()
        try:
            value = float(written)
        except ValueError:
            error = wrong_type("score", "a number, or a list of them", value)
            if _COMMA_NUMBER.fullmatch(written):
                error.todo = f"write {written.replace(',', '.')}, with a decimal point"
            raise error from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise wrong_type("score", "a number, or a list of them", value)
    return float(value)
