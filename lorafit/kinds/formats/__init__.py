"""Row formats: how the rows of a source are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from lorafit.registry import Registry

if TYPE_CHECKING:
    from lorafit.contracts import Sample


class Format(Protocol):
    """One way to write a training row.

    Attributes:
        priority: Which format is asked first when the rows decide (lower first).
        fields: The field names it reads, `{name: required}`.
    """

    priority: int
    fields: Mapping[str, bool]

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Whether a row looks like this format (its required fields are there)."""

    def read(self, row: Mapping[str, Any], file: str, line: int) -> Sample:
        """The row as a Sample. Raises DataError naming field, expected type and what was found."""


formats: Registry[Format] = Registry("format", "lorafit.kinds.formats")
