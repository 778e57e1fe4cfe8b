"""Row formats: how the rows of a source are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from lorafit.contracts import JsonMapping, Sample
from lorafit.kinds.registry import Registry


class Format(Protocol):
    """One way to write a training row, and the prompt of such a row.

    Attributes:
        priority: Which format is asked first when the rows decide (lower first).
        fields: The field names it reads, `{name: required}`.
        answer: The required field that a prompt may lack, since the model is to write it; None where the answer is part
            of a field that asks (the last turn of a chat).
        asks: The field that a person is told to write a prompt in; None where another format has it.
        known_as: What other tools and data sets call a field, lower case, for a message that says how to map columns.
        rare: Optional fields that few rows have: a message maps them only where a row has such a column.
        form: How its fields are written, behind the names of them, where that is not plain.
        rewordable: Fields with texts that carry neither loss nor label, so that a copy of a row may have others there.
        verbatim: Whether its rows go through no chat template (unless the recipe names one).
    """

    priority: int
    fields: Mapping[str, bool]
    answer: str | None = None
    asks: str | None = None
    known_as: Mapping[str, tuple[str, ...]] = {}
    rare: frozenset[str] = frozenset()
    form: str = ""
    rewordable: frozenset[str] = frozenset()
    verbatim: bool = False

    def matches(self, row: JsonMapping) -> bool:
        """Whether a row looks like this format: its required fields are there."""
        return required_fields(self) <= row.keys()

    def read(self, row: JsonMapping, file: str, line: int) -> Sample:
        """The row as a Sample. Raises DataError naming field, expected type and what was found."""

    def read_prompt(self, row: JsonMapping, file: str, line: int) -> Sample:
        """What stands before the row's last trained answer; the answer itself may be missing. Raises as `read`."""


def required_fields(kind: Format, *, prompts: bool = False) -> frozenset[str]:
    """Fields that a row of a format must have; of a prompt, those that ask. Empty where a format has no prompts."""
    return frozenset(
        field for field, needed in kind.fields.items() if needed and not (prompts and field == kind.answer)
    )


formats: Registry[Format] = Registry("format", "lorafit.kinds.formats")
