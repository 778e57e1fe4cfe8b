"""Chats as ShareGPT writes them: `{"conversations": [{"from": "human", "value": "..."}, ...]}`."""

from __future__ import annotations

from collections.abc import Mapping

from lorafit.console.nearest import nearest
from lorafit.contracts import JsonObject, Message, Sample
from lorafit.errors import DataError
from lorafit.kinds.chat_fields import read_call, read_entries, read_tools, read_weight, with_system, without_answer
from lorafit.kinds.fields import (
    CHECKS,
    Row,
    listed,
    missing_field,
    read_checks,
    read_json,
    read_optional_string,
    read_string,
    wrong_type,
)
from lorafit.kinds.formats import Format, formats

_ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "system": "system", "function_call": "function_call",
    "observation": "tool", "tool": "tool", "function_response": "tool",
}  # fmt: skip


@formats.register("sharegpt")
class ShareGpt(Format):
    """human, gpt, system, function_call (a JSON call, or a list of them) and observation turns."""

    priority = 20
    asks = "conversations"
    fields: Mapping[str, bool] = {"conversations": True, "system": False, "tools": False, **CHECKS}

    def read(self, row: Row, file: str, line: int) -> Sample:
        """The chat in OpenAI's form."""
        if "conversations" not in row:
            raise missing_field("conversations", row)
        entries = read_entries(row, "conversations")
        turns = [_read_turn(entry, f"conversations[{number}]") for number, entry in enumerate(entries)]
        system = read_optional_string(row, "system")
        if system and turns[0]["role"] == "system":
            raise DataError("stands in the row and in its first turn", key="system", todo="keep one of them")
        messages = with_system(system, turns)
        return Sample(file, line, messages=messages, tools=read_tools(row), **read_checks(row))

    def read_prompt(self, row: Row, file: str, line: int) -> Sample:
        """The chat up to the answer that is to be written."""
        return without_answer(self.read(row, file, line), "conversations")


def _read_turn(entry: JsonObject, place: str) -> Message:
    if "from" not in entry and "role" in entry:
        todo = "that is format messages: columns: {messages: conversations}"
        raise DataError("entries have 'role' and 'content'", key=place, todo=todo)
    for name in ("from", "value"):
        if name not in entry:
            raise DataError(f"missing field '{name}'; found {listed(entry) or 'nothing'}", key=place)
    who = entry["from"]
    if not isinstance(who, str):
        raise wrong_type(f"{place}.from", "string", who)
    role = _ROLES.get(who.lower())
    if role is None:
        close = nearest(who, _ROLES, count=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise DataError(f"unknown role '{who}'", key=f"{place}.from", todo=f"{hint}roles are {', '.join(_ROLES)}")
    try:
        value = read_string(entry, "value")
    except DataError as error:
        raise DataError(error.what, key=f"{place}.value") from None
    turn: Message = {"role": role, "content": value}
    if role == "function_call":
        calls = read_json(value, f"{place}.value")
        calls = calls if isinstance(calls, list) else [calls]
        if not calls:
            raise DataError("holds no call", key=f"{place}.value")
        turn = {"role": "assistant", "content": "", "tool_calls": [read_call(call, f"{place}.value") for call in calls]}
    if entry.get("weight") is not None:
        turn["weight"] = read_weight(entry["weight"], turn["role"], place)
    return turn
