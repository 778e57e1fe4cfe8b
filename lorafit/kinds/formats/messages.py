"""Chats as OpenAI writes them: `{"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}`."""

from __future__ import annotations

from collections.abc import Mapping

from lorafit.contracts import JsonObject, Message, Sample
from lorafit.errors import DataError
from lorafit.kinds.chat_fields import (
    check_role,
    read_call,
    read_content,
    read_entries,
    read_tools,
    read_weight,
    without_answer,
)
from lorafit.kinds.fields import Row, listed, missing_field, read_must_contain, wrong_type
from lorafit.kinds.formats import formats


@formats.register("messages")
class Messages:
    """Roles system, developer, user, assistant and tool; tool calls, reasoning and names; `weight: 0` on a turn."""

    priority = 10
    fields: Mapping[str, bool] = {"messages": True, "tools": False, "must_contain": False}
    answer: str | None = None
    known_as: Mapping[str, tuple[str, ...]] = {}
    verbatim = False

    def matches(self, row: Row) -> bool:
        """Whether the row has messages."""
        return "messages" in row

    def read(self, row: Row, file: str, line: int) -> Sample:
        """The chat, with `arguments` parsed and contents as strings."""
        if "messages" not in row:
            raise missing_field("messages", row)
        entries = read_entries(row, "messages")
        turns = tuple(_read_turn(entry, f"messages[{number}]") for number, entry in enumerate(entries))
        return Sample(file, line, messages=turns, tools=read_tools(row), must_contain=read_must_contain(row))

    def read_prompt(self, row: Row, file: str, line: int) -> Sample:
        """The chat up to the answer that is to be written."""
        return without_answer(self.read(row, file, line), "messages")


def _read_turn(entry: JsonObject, place: str) -> Message:
    if "role" not in entry and "from" in entry:
        todo = "that is format sharegpt: columns: {conversations: messages}"
        raise DataError("entries have 'from' and 'value'", key=place, todo=todo)
    if "role" not in entry:
        raise DataError(f"missing field 'role'; found {listed(entry) or 'nothing'}", key=place)
    role = check_role(entry["role"], place)
    turn: Message = {key: value for key, value in entry.items() if value is not None}
    calls = _read_calls(turn, place)
    if calls and role != "assistant":
        raise DataError(f"a turn of the {role} cannot call tools", key=f"{place}.tool_calls")
    if calls:
        turn["tool_calls"] = calls
    if "content" in turn:
        turn["content"] = read_content(turn["content"], place)
    elif calls or (role == "assistant" and _has_reasoning(turn)):
        turn["content"] = ""
    elif "content" in entry:
        raise wrong_type(f"{place}.content", "string", None)
    else:
        error = missing_field("content", entry)
        raise DataError(error.what, key=place, todo=(error.todo or "").split("rename")[0].strip() or None)
    if "weight" in turn:
        turn["weight"] = read_weight(turn["weight"], role, place)
    return turn


def _has_reasoning(turn: Message) -> bool:
    return any(isinstance(turn.get(name), str) for name in ("reasoning_content", "reasoning", "thinking"))


def _read_calls(turn: Message, place: str) -> list[JsonObject]:
    """Takes `tool_calls`, and the older `function_call`, out of the turn."""
    calls, single = turn.pop("tool_calls", None), turn.pop("function_call", None)
    if single is not None:
        calls = [*(calls or []), single]
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise wrong_type(f"{place}.tool_calls", "list", calls)
    return [read_call(call, f"{place}.tool_calls[{number}]") for number, call in enumerate(calls)]
