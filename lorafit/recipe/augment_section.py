"""The recipe's section of changed copies of training rows."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from lorafit.kinds.section import Section


class AugmentedFieldSection(Section):
    """How a copy's text in one field differs from the row's."""

    field: Annotated[str, Field(min_length=1)]
    """A text that asks, as the format calls it: `question`, `instruction`, `input`, `prompt`, `source`, `text` or
    `text_pair`."""
    templates: list[str] = Field(default=[])
    """Phrasings, each with the field in braces, e.g. ["Please answer: {question}"]; the copies of a row take them in
    turn."""
    drop: float = Field(default=0.0, ge=0.0, le=0.5)
    """How likely a word is left out (0 to 0.5); one always stays."""
    swap: float = Field(default=0.0, ge=0.0, le=0.5)
    """How likely a word is exchanged with the next one (0 to 0.5)."""
    typo: float = Field(default=0.0, ge=0.0, le=0.5)
    """How likely two letters inside a word of at least four are exchanged (0 to 0.5)."""

    @model_validator(mode="after")
    def _changes_something(self) -> AugmentedFieldSection:
        lacking = next((text for text in self.templates if f"{{{self.field}}}" not in text), None)
        if lacking is not None:
            raise ValueError(f"template '{lacking}' has no {{{self.field}}}, where the text is to stand")
        if not (self.templates or self.drop or self.swap or self.typo):
            raise ValueError(f"field '{self.field}' stays as it is: give templates, drop, swap or typo")
        return self


class AugmentSection(Section):
    """Changed copies of training rows; held-out rows have none."""

    copies: Annotated[int, Field(ge=1, le=100)] = 1
    """Further rows for each training row, which itself stays as it is."""
    fields: list[AugmentedFieldSection] = Field(min_length=1)
    """What differs in them."""
