"""What bounds the rows of a task, and how a row of two texts becomes tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafit.contracts import TaskRow


@dataclass(frozen=True, slots=True)
class TwoTexts:
    """How a row's source, which an encoder reads, and its target, which a decoder writes, become tokens.

    Attributes:
        prefix: Stands before every source.
        max_target_length: In tokens.
        source_language, target_language: What the tokenizer calls them; None where it is told none.
    """

    prefix: str = ""
    max_target_length: int = 128
    source_language: str | None = None
    target_language: str | None = None


@dataclass(frozen=True, slots=True)
class Limit:
    """The most tokens of a row, or of one of its columns.

    Attributes:
        option: Of the recipe, by its section: `data.max_length`.
        most: Its value.
        column: Of the task; empty where the row's longest sequence counts.
    """

    option: str
    most: int
    column: str = ""

    def excess(self, row: TaskRow) -> str:
        """What is longer, in words; empty where nothing is."""
        tokens = len(row.columns[self.column]) if self.column else row.tokens
        what = f"{self.column} of {tokens} tokens" if self.column else f"{tokens} tokens"
        return f"{what}, {self.name} is {self.most}" if tokens > self.most else ""

    @property
    def name(self) -> str:
        """The option without its section."""
        return self.option.rpartition(".")[2]
