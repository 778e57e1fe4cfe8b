"""Chats as OpenAI writes them: `{"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}`."""

from __future__ import annotations

from collections.abc import Mapping

from lorafit.contracts import Sample
from lorafit.kinds.chat_fields import read_tools, read_turns, without_answer
from lorafit.kinds.fields import CHECKS, Row, missing_field, read_checks
from lorafit.kinds.formats import Format, formats


@formats.register("messages")
class Messages(Format):
    """Roles system, developer, user, assistant and tool; tool calls, reasoning and names; `weight: 0` on a turn."""

    priority = 10
    asks = "messages"
    fields: Mapping[str, bool] = {"messages": True, "tools": False, **CHECKS}

    def read(self, row: Row, file: str, line: int) -> Sample:
        """The chat, with `arguments` parsed and contents as strings."""
        if "messages" not in row:
            raise missing_field("messages", row)
        return Sample(file, line, messages=read_turns(row, "messages"), tools=read_tools(row), **read_checks(row))

    def read_prompt(self, row: Row, file: str, line: int) -> Sample:
        """The chat up to the answer that is to be written."""
        return without_answer(self.read(row, file, line), "messages")
