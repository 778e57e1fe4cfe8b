"""Share of answers that call the right tools with the right arguments, and of needless calls where none was due.

Calls are read from the text that the model wrote, in the forms that chat templates write:

    <tool_call>{"name": .., "arguments": ..}</tool_call>         Hermes, Qwen2.5, Qwen3, SmolLM3, Granite 4
    <tool_call><function=NAME><parameter=KEY>..                  Qwen3-Coder, Qwen3.5
    <tool_call>NAME<arg_key>KEY</arg_key><arg_value>..           GLM-4.5
    <|tool_call|>[{"name": .., "arguments": ..}]                 Phi-4, Granite 3
    {"name": .., "parameters": ..}                               Llama 3, with or without <|python_tag|>
    [TOOL_CALLS] [{"name": .., "arguments": ..}]                 Mistral; also [TOOL_CALLS]NAME[ARGS]{..}
    <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME .. {..}        DeepSeek-V3, R1; V3.1 without `function`
    <|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{..}     Kimi-K2
    to=functions.NAME .. <|message|>{..}                         gpt-oss

The reference is read by the same code. Where it cannot be, or where that finds other tools than the row holds, a right
answer could not be recognised either: the row is left out and counted.
"""

from __future__ import annotations

import json
import re
from typing import Any

from lorafit.kinds.metrics import RowScore, ShareOfRows, metrics

Call = tuple[str, Any]
"""A tool's name and its arguments as parsed JSON."""

_REASONING = re.compile(r"^.*</think>", re.DOTALL)
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
_LISTED = re.compile(r"(?:<\|tool_call\|>|\[TOOL_CALLS\](?=\s*[\[{]))(.*?)(?:<\|/tool_call\|>|\Z)", re.DOTALL)
_NAMED = re.compile(  # a name, then its arguments up to the next call
    r"(?:"
    r"\[TOOL_CALLS\]\s*(?P<mistral>[\w.-]+)\s*(?:\[CALL_ID\]\s*[\w-]+\s*)?(?:\[ARGS\])?"
    r"|<｜tool▁call▁begin｜>\s*(?:function\s*<｜tool▁sep｜>)?\s*(?P<deepseek>[\w.-]+)\s*(?:<｜tool▁sep｜>)?"
    r"|<\|tool_call_begin\|>\s*functions\.(?P<kimi>[\w.-]+):\d+\s*<\|tool_call_argument_begin\|>"
    r"|\bto=functions\.(?P<harmony>[\w.-]+)[^{]*?<\|message\|>"
    r")(?P<arguments>.*?)"
    r"(?=\[TOOL_CALLS\]|<｜tool▁call▁|<｜tool▁calls▁|<\|tool_calls?_|<\|call\|>|<\|start\|>|<\|end\|>|\Z)",
    re.DOTALL,
)
_MARKS = re.compile(r"<\|?tool_call\|?>|\[TOOL_CALLS\]|<｜tool▁call|<\|tool_call|<\|python_tag\|>|\bto=functions\.")
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)(?:</function>\s*)?", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_KEYED = re.compile(r"\s*([\w.-]+)\s*((?:<arg_key>.*)?)", re.DOTALL)
_KEY = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_FENCE = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)
_BEGUN = re.compile(r'\s*\{\s*"(?:name|type)"\s*:\s*"[^"]*"\s*,\s*"(?:parameters|arguments|function)"')  # as Llama's do
_BETWEEN = re.compile(r"[\s;,]*")


class _NoCallError(ValueError):
    """Something begins as a call and is none."""


def read_calls(text: str) -> list[Call] | None:
    """The calls in a text, in order: empty where it calls nothing, None where what begins as a call cannot be read."""
    text = _REASONING.sub("", text).strip()
    try:
        if tagged := _TAGGED.findall(text):
            return [call for body in tagged for call in _read_tagged(body)]
        if named := list(_NAMED.finditer(text)):
            return [_read_named(match) for match in named]
        if listed := _LISTED.findall(text):
            return [call for body in listed for call in _read_json(body)]
        bare = text.removeprefix("<|python_tag|>").lstrip()
        if bare.startswith(("{", "[")):
            return _read_json(bare)
    except _NoCallError:
        return None if _MARKS.search(text) or _BEGUN.match(text) else []
    return None if _MARKS.search(text) else []


def _read_tagged(body: str) -> list[Call]:
    """What stands between <tool_call> tags: JSON, or a function with tagged parameters."""
    if (function := _FUNCTION.fullmatch(body)) is not None:
        return [(function[1], {key: _loose(value) for key, value in _PARAMETER.findall(function[2])})]
    if (keyed := _KEYED.fullmatch(body)) is not None:
        return [(keyed[1], {key.strip(): _loose(value) for key, value in _KEY.findall(keyed[2])})]
    return _read_json(body)


def _read_named(match: re.Match[str]) -> Call:
    name = next(match[group] for group in ("mistral", "deepseek", "kimi", "harmony") if match[group])
    arguments = match["arguments"]
    fenced = _FENCE.fullmatch(arguments)
    return name, _parse(fenced[1] if fenced else arguments.strip())


def _read_json(text: str) -> list[Call]:
    """Calls as JSON objects, one after another or in lists."""
    place, found = 0, list[Call]()
    decoder = json.JSONDecoder(parse_constant=_refuse)
    text = text.strip()
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise _NoCallError from error
        found += [_as_call(one) for one in (value if isinstance(value, list) else [value])]
        between = _BETWEEN.match(text, place)
        place = between.end() if between else place
    return found


def _as_call(value: Any) -> Call:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise _NoCallError
    given = [value[key] for key in ("arguments", "parameters") if key in value]
    if len(given) != 1:
        raise _NoCallError
    return value["name"], _parse(given[0]) if isinstance(given[0], str) else given[0]


def _parse(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise _NoCallError from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _loose(text: str) -> Any:
    """A tagged parameter is JSON, or a string as it stands."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON: 1 is 1.0 and not true; the order of keys is free."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _due(row: RowScore) -> list[Call] | None:
    """The calls that a right answer makes; None where the reference's cannot be read."""
    calls = read_calls(row.reference)
    if row.calls and (calls is None or tuple(name for name, _ in calls) != row.calls):
        return None
    return calls


@metrics.register("tool_call")
class ToolCall(ShareOfRows):
    """All calls of the reference, and no others: names, arguments and order."""

    name = "tool_call"
    needs = "calls"
    condition = "a row with an assistant turn that calls a tool, in a form that is known"
    companions = ("needless_call",)
    while_training = False
    settings = "names and arguments equal as JSON, order of keys free, several calls in order"

    def usable(self, row: RowScore) -> bool:
        """Rows that got an answer and whose reference holds calls that can be read."""
        return row.written is not None and bool(_due(row))

    def holds(self, row: RowScore) -> bool:
        """The same calls. What cannot be read is wrong."""
        return _same(read_calls(row.written or ""), _due(row))


@metrics.register("needless_call")
class NeedlessCall(ShareOfRows):
    """A call where the reference makes none, well-formed or not."""

    name = "needless_call"
    better = "lower"
    condition = "a row whose reference calls no tool"
    settings = "answers that call a tool, or begin to, where the reference does not"

    def usable(self, row: RowScore) -> bool:
        """Rows that got an answer and whose reference calls nothing."""
        return row.written is not None and not row.calls and read_calls(row.reference) == []

    def holds(self, row: RowScore) -> bool:
        """The answer calls something, or begins to."""
        return read_calls(row.written or "") != []
