"""Texts with what is to be predicted of them as a number: `{"text": "...", "score": 3.5}`; a list for several."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from lorafit.contracts import Sample
from lorafit.kinds.fields import (
    Row,
    missing_field,
    read_filled_or_none,
    read_filled_string,
    read_json_list,
    wrong_type,
)
from lorafit.kinds.formats import Format, formats

_COMMA_NUMBER = re.compile(r"[-+]?\d+,\d+")


@formats.register("text_score")
class TextScore(Format):
    """A text, or two, and a number; only a task that predicts numbers asks for it before plain text."""

    priority = 65
    fields: Mapping[str, bool] = {"text": True, "text_pair": False, "score": True}
    known_as: Mapping[str, tuple[str, ...]] = {
        "text": ("sentence1", "sentence", "premise", "content", "review", "comment", "message", "question", "body"),
        "text_pair": ("sentence2", "hypothesis", "text2", "question2"),
        "score": ("label", "rating", "stars", "similarity", "similarity_score", "target", "value", "grade"),
    }
    rare = frozenset({"text_pair"})
    verbatim = True

    def read(self, row: Row, file: str, line: int) -> Sample:
        """The text with its numbers, in the row's order; a table's cell may hold one as text, or a JSON list."""
        sample = self.read_prompt(row, file, line)
        if "score" not in row:
            raise missing_field("score", row)
        value = row["score"]
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = read_json_list(value, "score")
        found = tuple(_number(one) for one in (value if isinstance(value, list) else [value]))
        return replace(sample, numbers=found)

    def read_prompt(self, row: Row, file: str, line: int) -> Sample:
        """The text alone, of which a number is asked; a line of a txt file is one too."""
        asked = {"text": row["prompt"]} if "text" not in row and "prompt" in row else row
        text, second = read_filled_string(asked, "text"), read_filled_or_none(asked, "text_pair")
        return Sample(file, line, text=text, text_pair=second, numbers=())


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
