"""A chat as a template gets it, every string in it knowing where it stands: a *leaf* (see `traced_text`).

    leaves of the tools, 1 to T          leaves of the messages, from T + 1
    weather · city · string · ...        hello · What is ... · ...

The tools come first, so that what was made of a list of tools holds for every row that has the same list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from lorafit.contracts import JsonMapping
from lorafit.data.chat.jinja_environment import JsonMemo, Record
from lorafit.data.chat.traced_text import typed_leaf
from lorafit.errors import DataError
from lorafit.kinds.chat_fields import REASONING_FIELDS

Messages = Sequence[JsonMapping]
Tools = Sequence[JsonMapping]

TOOLS = -1
"""Stands for the tools where a message's number is asked for."""

KNOWN_ROLES = frozenset(
    ["system", "developer", "user", "assistant", "tool", "function", "ipython", "model", "environment", "observation"]
)
_KEPT_CHARACTERS = 200_000  # of a set's JSON


class Leaf(NamedTuple):
    """One string of the chat: `message` (-1 for tools), the path to it there, its text; a key has the path of its
    value.
    """

    message: int
    path: tuple[str | int, ...]
    text: str
    is_key: bool = False


@dataclass(frozen=True, slots=True)
class ToolSet:
    """A list of tools.

    Attributes:
        typed: The tools with every string as a leaf; None for a chat without.
        leaves: These.
        names: Numbers of the leaves that name a tool.
        memo: JSON of their parts.
    """

    typed: list[Any] | None
    leaves: tuple[Leaf, ...]
    names: tuple[int, ...]
    memo: JsonMemo

    @classmethod
    def of(cls, tools: Tools | None) -> ToolSet:
        """The set of some tools; the one that was made before where they are the same.

        Raises:
            DataError: They are no JSON.
        """
        try:
            text = json.dumps(tools)
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"the tools are no JSON: {error}", key="tools") from None
        return (_build_tool_set if len(text) <= _KEPT_CHARACTERS else _build_tool_set.__wrapped__)(text)


@lru_cache(maxsize=64)  # rows that have tools mostly have the same ones
def _build_tool_set(text: str) -> ToolSet:
    leaves: list[Leaf] = []
    tools = _typed(json.loads(text), TOOLS, (), leaves)
    names = tuple(
        number
        for number, leaf in enumerate(leaves, 1)
        if leaf.path[-1] == "name" and not leaf.is_key and "parameters" not in leaf.path
    )
    functions = [tool["function"] for tool in tools or () if isinstance(tool, dict) and "function" in tool]
    return ToolSet(tools, tuple(leaves), names, JsonMemo([tools, *(tools or ()), *functions]))


class TypedChat:
    """A chat with its tools, every string as a leaf.

    Attributes:
        records: The messages as transformers hands them to a template, typed.
        leaves: Every string; `leaves[n - 1]` is leaf n.
        tools: The tools.
        memo: JSON of parts of the messages.
    """

    def __init__(self, messages: Messages, tools: Tools | None) -> None:
        self.tools = ToolSet.of(tools)
        self.leaves: list[Leaf] = list(self.tools.leaves)
        self.records = [_typed_message(message, index, self.leaves) for index, message in enumerate(messages)]
        arguments = [part for message in self.records for part in _arguments(message)]
        self.memo = JsonMemo(arguments, behind=self.tools.memo)


def _typed_message(message: JsonMapping, index: int, leaves: list[Leaf]) -> Record:
    """The message without its null fields, its reasoning under the names that templates read (as transformers does)."""
    record = Record()
    record._index = index
    for key, value in message.items():
        if value is None:
            continue
        known = key == "role" and value in KNOWN_ROLES
        record[key] = value if known else _typed(value, index, (key,), leaves)
    reasoning = next((record[name] for name in REASONING_FIELDS if name in record), None)
    if reasoning is not None:
        record.setdefault("thinking", reasoning)
        record["reasoning_content"] = reasoning
    return record


def _typed(value: Any, message: int, path: tuple[str | int, ...], leaves: list[Leaf], is_key: bool = False) -> Any:
    """The value with every string in it, keys too, as a leaf."""
    if isinstance(value, str):
        leaves.append(Leaf(message, path, value, is_key))
        return typed_leaf(value, len(leaves))
    if isinstance(value, (list, tuple)):
        return [_typed(item, message, (*path, place), leaves) for place, item in enumerate(value)]
    if isinstance(value, (dict, Mapping)):  # the second takes ten times as long
        return {
            _typed(key, message, (*path, key), leaves, True): _typed(item, message, (*path, key), leaves)
            for key, item in value.items()
        }
    return value


def _arguments(message: JsonMapping) -> Iterator[Any]:
    """What templates write as JSON: calls, their functions, and the arguments of these."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        yield call
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict):
            yield function
            yield function.get("arguments")
