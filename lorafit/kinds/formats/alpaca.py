"""Instructions as Alpaca writes them: `{"instruction": "...", "input": "...", "output": "..."}`."""

from __future__ import annotations

from collections.abc import Mapping

from lorafit.contracts import Message, Sample
from lorafit.kinds.chat_fields import assistant_turn, user_turn, with_system
from lorafit.kinds.fields import (
    CHECKS,
    Row,
    read_checks,
    read_filled_string,
    read_json_list,
    read_optional_string,
    wrong_type,
)
from lorafit.kinds.formats import Format, formats


@formats.register("alpaca")
class Alpaca(Format):
    """The user's turn is instruction and input, an empty line between them; the assistant's is the output."""

    priority = 30
    asks = "instruction"
    fields: Mapping[str, bool] = {
        "instruction": True,
        "output": True,
        "input": False,
        "system": False,
        "history": False,
        **CHECKS,
    }
    answer = "output"
    rewordable = frozenset({"instruction", "input"})
    known_as: Mapping[str, tuple[str, ...]] = {
        "instruction": ("question", "prompt", "query", "problem", "sql_prompt"),
        "input": ("context", "passage", "schema", "sql_context"),
        "output": ("response", "answer", "completion", "solution", "sql", "target"),
    }

    def read(self, row: Row, file: str, line: int) -> Sample:
        """A chat of the history and one more turn each."""
        messages = (*_read_asked(row), assistant_turn(read_filled_string(row, "output")))
        return Sample(file, line, messages=messages, **read_checks(row))

    def read_prompt(self, row: Row, file: str, line: int) -> Sample:
        """The same chat up to the user's last turn."""
        return Sample(file, line, messages=_read_asked(row), **read_checks(row))


def _read_asked(row: Row) -> tuple[Message, ...]:
    instruction, addition = read_filled_string(row, "instruction"), read_optional_string(row, "input")
    asked = f"{instruction}\n\n{addition}" if addition.strip() else instruction
    return with_system(read_optional_string(row, "system"), [*_read_history(row), user_turn(asked)])


def _read_history(row: Row) -> list[Message]:
    history = row.get("history")
    if isinstance(history, str):
        history = read_json_list(history, "history") if history.strip() else None
    if history is None:
        return []
    if not isinstance(history, list):
        raise wrong_type("history", "list of [instruction, output] pairs", history)
    turns: list[Message] = []
    for number, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise wrong_type(f"history[{number}]", "[instruction, output], two strings", pair)
        turns += [user_turn(pair[0]), assistant_turn(pair[1])]
    return turns
