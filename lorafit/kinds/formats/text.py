"""Plain text: `{"text": "..."}`, or a txt file."""

from __future__ import annotations

from collections.abc import Mapping

from lorafit.contracts import Sample
from lorafit.errors import DataError
from lorafit.kinds.fields import Row, read_filled_string, read_must_contain
from lorafit.kinds.formats import Format, formats


@formats.register("text")
class Text(Format):
    """Every token is trained, the end of text included."""

    priority = 60
    fields: Mapping[str, bool] = {"text": True, "must_contain": False}
    answer = "text"
    known_as: Mapping[str, tuple[str, ...]] = {"text": ("content", "body", "document", "article")}
    verbatim = True

    def read(self, row: Row, file: str, line: int) -> Sample:
        """The text as it is."""
        return Sample(file, line, text=read_filled_string(row, "text"), must_contain=read_must_contain(row))

    def read_prompt(self, row: Row, file: str, line: int) -> Sample:
        """Refused: all of a text is the answer."""
        raise DataError("plain text has no prompt", key="text", todo="name the column that asks: prompt")
