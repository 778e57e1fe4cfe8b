"""Turns and tools of a chat, brought to one form: OpenAI's, with `arguments` as objects, as templates want them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from lorafit.console.nearest import nearest
from lorafit.contracts import JsonMapping, JsonObject, Message, Sample
from lorafit.errors import DataError
from lorafit.kinds.fields import (
    Row,
    describe,
    listed,
    missing_field,
    read_filled_string,
    read_json,
    read_json_list,
    wrong_type,
)

# transformers fills the first two from any of them
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
ROLES = ("system", "developer", "user", "assistant", "tool")
_MEANT = {
    "human": "user", "prompter": "user",
    "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant", "chatgpt": "assistant",
    "function": "tool", "ipython": "tool", "observation": "tool", "environment": "tool",
}  # fmt: skip


def read_entries(row: Row, name: str) -> list[JsonObject]:
    """The entries of a chat's list; a JSON list in a string (from a table) is read too.

    Raises:
        DataError: It is no list of objects, or an empty one.
    """
    value = row[name]
    if isinstance(value, str):
        value = read_json_list(value, name)
    if not isinstance(value, list):
        raise wrong_type(name, "list", value)
    if not value:
        raise DataError("is empty; a chat needs a user and an assistant turn", key=name)
    for number, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise wrong_type(f"{name}[{number}]", "object", entry)
    return value


def check_role(role: Any, place: str) -> str:
    """The role, if it is one.

    Raises:
        DataError: It is not; the message names the one that was probably meant.
    """
    if not isinstance(role, str):
        raise wrong_type(f"{place}.role", "string", role)
    if role in ROLES:
        return role
    close = [_MEANT[role.lower()]] if role.lower() in _MEANT else nearest(role, ROLES, count=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise DataError(f"unknown role '{role}'", key=f"{place}.role", todo=f"{hint}roles are {', '.join(ROLES)}")


def read_content(value: Any, place: str) -> str:
    """The text of a turn: a string, or parts `{type: text, text: ...}`, joined by newlines as vLLM and llama.cpp do.

    Raises:
        DataError: It is something else, or a part is not text.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong_type(f"{place}.content", "string", value)
    if all(isinstance(part, str) for part in value):
        what = f"expected string, found {'a list of strings' if value else 'an empty list'}"
        raise DataError(what, key=f"{place}.content", todo="write one string, or parts {type: text, text: string}")
    parts = []
    for number, part in enumerate(value):
        key = f"{place}.content[{number}]"
        if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif isinstance(part, dict) and part.get("type") != "text":
            todo = "images are for task image-text-to-text" if str(part.get("type")).startswith("image") else None
            what = f"part of type {describe(part.get('type'))} is not supported; only text is"
            raise DataError(what, key=key, todo=todo)
        else:
            raise wrong_type(key, "{type: text, text: string}", part)
    return "\n".join(parts)


def read_weight(value: Any, role: str, place: str) -> int:
    """Whether a turn carries loss: 1, or 0.

    Raises:
        DataError: It is another number, or stands on a turn that never carries loss.
    """
    if isinstance(value, bool | int | float) and value in (0, 1):
        if role != "assistant" and value:
            raise DataError(f"a turn of the {role} never carries loss", key=f"{place}.weight", todo="leave weight out")
        return int(value)
    raise wrong_type(f"{place}.weight", "0 or 1", value)


def read_call(value: Any, place: str) -> JsonObject:
    """One tool call as `{type, function: {name, arguments: object}, id?}`; a flat `{name, arguments}` is wrapped.

    Raises:
        DataError: It has no name, or its arguments are no JSON object.
    """
    if not isinstance(value, dict):
        raise wrong_type(place, "object", value)
    function = _named_function(value, "tool call has no function name", place)
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = read_json(arguments, f"{place}.arguments") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise wrong_type(f"{place}.arguments", "object", arguments)
    call: JsonObject = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": value["id"], **call} if value.get("id") is not None else call


def read_turns(row: Row, name: str, content: Callable[[Any, str], Any] = read_content) -> tuple[Message, ...]:
    """The turns of a chat as OpenAI writes them, with `arguments` parsed and contents as strings.

    Args:
        row: The row.
        name: Its field.
        content: Reads a content, of the turn at that place.

    Raises:
        DataError: It is no list of turns, or a turn is none.
    """
    return tuple(
        _read_turn(entry, f"{name}[{number}]", content) for number, entry in enumerate(read_entries(row, name))
    )


def count_images(turns: Iterable[JsonMapping]) -> int:
    """Image parts in some turns."""
    contents = (turn.get("content") for turn in turns)
    return sum(part.get("type") == "image" for parts in contents if isinstance(parts, list) for part in parts)


def _read_turn(entry: JsonObject, place: str, content: Callable[[Any, str], Any]) -> Message:
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
        turn["content"] = content(turn["content"], place)
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
    return any(isinstance(turn.get(name), str) for name in REASONING_FIELDS)


def text_of(turn: Message) -> str:
    """What a turn's content says."""
    content = turn.get("content", "")
    return "".join(str(part.get("text", "")) for part in content) if isinstance(content, list) else str(content)


def says_something(turn: Message) -> bool:
    """Whether an answer has a text, calls or reasoning: its end alone is nothing to learn."""
    said = (text_of(turn), *(turn.get(name) for name in ("tool_calls", *REASONING_FIELDS)))
    return any(value.strip() if isinstance(value, str) else value for value in said)


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


def _named_function(value: JsonObject, refusal: str, place: str) -> JsonObject:
    """What a call or a tool says under `function`, or itself where it is flat."""
    function = value.get("function", value if "name" in value else None)
    if isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]:
        return function
    raise DataError(f"{refusal}; found {listed(value)}", key=place)


def read_tools(row: Row, name: str = "tools") -> tuple[JsonObject, ...] | None:
    """The tools a chat may call, as `{type: function, function: {...}}`; None for none. A string holds them as JSON.

    Raises:
        DataError: It is something else, or a tool has no name.
    """
    value = row.get(name)
    if isinstance(value, str):
        value = read_json(value, name) if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise wrong_type(name, "list", value)
    tools = []
    for number, tool in enumerate(value):
        key = f"{name}[{number}]"
        if not isinstance(tool, dict):
            raise wrong_type(key, "object", tool)
        function = _named_function(tool, "tool has no name", key)
        tools.append({"type": "function", "function": function} if function is tool else tool)
    return tuple(tools)


def user_turn(content: str) -> Message:
    """A turn of the user."""
    return {"role": "user", "content": content}


def assistant_turn(content: str) -> Message:
    """A turn of the assistant."""
    return {"role": "assistant", "content": content}


def is_chat(value: object) -> bool:
    """Whether a field holds turns: a list, or one that a table holds as text."""
    return isinstance(value, list) or (isinstance(value, str) and value.startswith('[{"') and '"role"' in value)


def read_side(row: Row, name: str, turn: Callable[[str], Message]) -> tuple[Message, ...]:
    """The turns of a field that asks or answers; a string beside fields of turns is one `turn`.

    Raises:
        DataError: It is neither, or a turn is none.
    """
    value = row[name]
    if isinstance(value, str) and not is_chat(value):
        return (turn(read_filled_string(row, name)),)
    if not isinstance(value, list | str):
        raise wrong_type(name, "string or list of turns", value)
    return read_turns(row, name)


def without_loss(turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turns that ask, what an assistant said in them without weight."""
    return tuple({**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in turns)


def with_system(system: str, turns: list[Message]) -> tuple[Message, ...]:
    """The turns behind a system message, if there is one."""
    return ({"role": "system", "content": system}, *turns) if system else tuple(turns)


def without_answer(sample: Sample, key: str) -> Sample:
    """The prompt of a chat: all of it where it waits for an answer, else what stands before its last trained answer.

    A chat that ends in an assistant turn, none of which is trained, is cut before its last turn.

    Args:
        sample: The chat.
        key: The field it was read from, for the message.

    Raises:
        DataError: Nothing is asked.
    """
    turns = sample.messages or ()
    if turns and turns[-1]["role"] == "assistant":
        answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
        trained = [place for place in answers if turns[place].get("weight", 1) != 0]
        turns = turns[: (trained or answers)[-1]]
    if all(turn["role"] in ("system", "developer") for turn in turns):
        raise DataError("holds no turn to answer", key=key, todo="a prompt ends with a turn of the user or a tool")
    return replace(sample, messages=turns)
