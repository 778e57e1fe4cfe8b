"""What each row format makes of a row, and how it refuses one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorafit.contracts import Sample
from lorafit.data.sources.row_columns import find_format
from lorafit.errors import DataError
from lorafit.files.strict_json import JsonError, parse_json
from lorafit.kinds.formats import formats

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}


def read(format_name: str, **row: Any) -> Sample:
    return formats.get(format_name).read(row, "d.jsonl", 7)


def refusal(format_name: str, **row: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(format_name, **row)
    return str(caught.value)


def turns(*pairs: tuple[str, str]) -> tuple[dict[str, str], ...]:
    return tuple({"role": role, "content": content} for role, content in pairs)


def test_every_format_knows_its_own_rows() -> None:
    rows = {
        "messages": {"messages": []},
        "sharegpt": {"conversations": []},
        "alpaca": {"instruction": "", "output": "", "text": ""},
        "question_answer": {"question": "", "answer": ""},
        "preference": {"prompt": "", "chosen": "", "rejected": ""},
        "prompt_completion": {"prompt": "", "completion": ""},
        "unpaired_preference": {"prompt": "", "completion": "", "label": "true"},
        "text": {"text": ""},
        "text_label": {"text": "", "label": ""},
        "text_score": {"text": "", "score": 1},
        "word_labels": {"words": [], "labels": []},
        "source_target": {"source": "", "target": ""},
    }
    only_where_wanted = {"image_messages"}  # it reads the rows of messages, for a task that reads images
    assert formats.names() == sorted(rows.keys() | only_where_wanted)
    for name, row in rows.items():
        wanted = name if name == "text_score" else None  # a table of texts may well have a column of that name
        assert find_format(row, wanted=wanted) == name
    assert find_format(rows["text_score"]) == "text"


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
        ("alpaca", {"instruction": "a", "output": "b"}),
        ("question_answer", {"question": "a", "answer": "b"}),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}),
        ("prompt_completion", {"prompt": "a", "completion": "b"}),
        ("unpaired_preference", {"prompt": "a", "completion": "b", "label": False}),
        ("text", {"text": "ab"}),
        ("source_target", {"source": "a", "target": "b"}),
    ],
)
def test_must_contain_is_read_everywhere(name: str, row: dict[str, Any]) -> None:
    assert read(name, **row).must_contain == ()
    assert read(name, **row, must_contain=["x", "y"]).must_contain == ("x", "y")
    assert read(name, **row, must_contain="x").must_contain == ("x",)
    assert read(name, **row, must_contain='["x", "y"]').must_contain == ("x", "y")
    assert read(name, **row, must_contain=None).must_contain == ()
    assert "must_contain" in refusal(name, **row, must_contain=3)
    assert "every answer contains" in refusal(name, **row, must_contain=["x", ""])
    with pytest.raises(DataError, match="missing"):
        read(name, must_contain="x")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
        ("alpaca", {"instruction": "a", "output": "b"}),
        ("question_answer", {"question": "a", "answer": "b"}),
        ("prompt_completion", {"prompt": "a", "completion": "b"}),
        ("source_target", {"source": "a", "target": "b"}),
    ],
)
def test_paraphrases_are_read_where_an_answer_is_asked(name: str, row: dict[str, Any]) -> None:
    assert read(name, **row).paraphrases == ()
    assert read(name, **row, paraphrases=["x", "y"]).paraphrases == ("x", "y")
    assert read(name, **row, paraphrases="x").paraphrases == ("x",)
    assert "paraphrases" in refusal(name, **row, paraphrases={"x": 1})
    assert "says nothing" in refusal(name, **row, paraphrases=["x", " "])


def test_messages() -> None:
    sample = read(
        "messages",
        messages=[
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "c1"}], "refusal": None},
            {"role": "tool", "content": "cold", "tool_call_id": "c1"},
            {"role": "assistant", "content": "", "reasoning_content": "hm", "weight": 0},
        ],
        tools=[WEATHER],
    )
    assert sample.messages == (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a\nb", "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **CALL}]},
        {"role": "tool", "content": "cold", "tool_call_id": "c1"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "weight": 0},
    )
    assert sample.tools == (WEATHER,)
    assert (sample.file, sample.line) == ("d.jsonl", 7)


@pytest.mark.parametrize("arguments", [{"city": "Oslo", "days": 2}, '{"city": "Oslo", "days": 2}'])
@pytest.mark.parametrize("form", ["tool_calls", "flat", "function_call"])
def test_arguments_become_objects(arguments: Any, form: str) -> None:
    function = {"name": "weather", "arguments": arguments}
    turn: dict[str, Any] = {"role": "assistant", "content": ""}
    if form == "function_call":
        turn["function_call"] = function
    else:
        turn["tool_calls"] = [function if form == "flat" else {"type": "function", "function": function}]
    sample = read("messages", messages=[turn])
    assert sample.messages is not None
    assert sample.messages[0]["tool_calls"] == [CALL]
    assert "function_call" not in sample.messages[0]


def test_empty_arguments_and_calls() -> None:
    turn = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now", "arguments": ""}}]}
    sample = read("messages", messages=[turn, {"role": "assistant", "content": "x", "tool_calls": []}])
    assert sample.messages is not None
    assert sample.messages[0]["tool_calls"][0]["function"]["arguments"] == {}
    assert "tool_calls" not in sample.messages[1]


@pytest.mark.parametrize(
    "tools", [[WEATHER], [WEATHER["function"]], json.dumps([WEATHER]), json.dumps([WEATHER["function"]])]
)
def test_tools_come_as_list_or_text(tools: Any) -> None:
    sample = read("messages", messages=[{"role": "user", "content": "a"}], tools=tools)
    assert sample.tools == (WEATHER,)


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools(tools: Any) -> None:
    assert read("messages", messages=[{"role": "user", "content": "a"}], tools=tools).tools is None


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"messages": "x"}, ["messages", "invalid JSON"]),
        ({"messages": 1}, ["messages", "expected list"]),
        ({"messages": []}, ["messages", "is empty", "assistant"]),
        ({"messages": ["x"]}, ["messages[0]", "expected object"]),
        ({"messages": [USER, {"role": "gpt", "content": "a"}]}, ["messages[1].role", "did you mean 'assistant'"]),
        ({"messages": [{"role": "asistant", "content": "a"}]}, ["unknown role", "did you mean 'assistant'"]),
        ({"messages": [{"role": 1, "content": "a"}]}, ["messages[0].role", "expected string"]),
        ({"messages": [{"content": "a"}]}, ["messages[0]", "missing field 'role'"]),
        ({"messages": [{"role": "user", "contnet": "a"}]}, ["messages[0]", "missing field 'content'", "'contnet'"]),
        ({"messages": [{"role": "user", "content": None}]}, ["messages[0].content", "expected string", "null"]),
        ({"messages": [{"role": "user", "content": 5}]}, ["messages[0].content", "expected string", "integer 5"]),
        ({"messages": [{"role": "user", "content": []}]}, ["messages[0].content", "expected string", "empty list"]),
        (
            {"messages": [USER, {"role": "assistant", "content": ["a", "b"]}]},
            ["messages[1].content", "list of strings"],
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ["content[0]", "image_url", "text"]),
        ({"messages": [{**USER, "tool_calls": [CALL]}]}, ["messages[0].tool_calls", "user cannot call tools"]),
        ({"messages": [{**USER, "weight": 1}]}, ["messages[0].weight", "never carries loss"]),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, ["weight", "expected 0 or 1"]),
        ({"messages": [{"from": "human", "value": "a"}]}, ["messages[0]", "sharegpt"]),
        ({"messages": [USER], "tools": "{oops"}, ["tools", "invalid JSON"]),
        ({"messages": [USER], "tools": [{"type": "function"}]}, ["tools[0]", "no name"]),
        ({"messages": [USER], "tools": {"name": "x"}}, ["tools", "expected list"]),
    ],
)
def test_messages_refuses(row: dict[str, Any], parts: list[str]) -> None:
    said = refusal("messages", **row)
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("call", "part"),
    [
        ("weather", "expected object"),
        ({"function": {"arguments": {}}}, "no function name"),
        ({"function": {"name": "weather", "arguments": "{oops"}}, "arguments: invalid JSON"),
        ({"function": {"name": "weather", "arguments": "[1]"}}, "expected object, found list"),
        ({"function": {"name": "weather", "arguments": '{"a": 1, "a": 2}'}}, "duplicate key 'a'"),
    ],
)
def test_a_malformed_call_is_refused(call: Any, part: str) -> None:
    said = refusal("messages", messages=[{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert part in said and "messages[0].tool_calls[0]" in said


def test_messages_from_a_table_are_json() -> None:
    assert read("messages", messages=json.dumps([USER])).messages == (USER,)


def test_sharegpt() -> None:
    sample = read(
        "sharegpt",
        conversations=[
            {"from": "human", "value": "weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}'},
            {"from": "observation", "value": "cold"},
            {"from": "gpt", "value": "It is cold.", "weight": 0},
        ],
        system="be brief",
        tools=json.dumps([WEATHER["function"]]),
    )
    assert sample.messages == (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "cold"},
        {"role": "assistant", "content": "It is cold.", "weight": 0},
    )
    assert sample.tools == (WEATHER,)


def test_sharegpt_calls_may_be_a_list_with_text_arguments() -> None:
    calls = [{"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'}] * 2
    sample = read("sharegpt", conversations=[{"from": "function_call", "value": json.dumps(calls)}])
    assert sample.messages is not None and sample.messages[0]["tool_calls"] == [CALL, CALL]


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"conversations": []}, ["conversations", "is empty"]),
        ({"conversations": [{"from": "humna", "value": "a"}]}, ["conversations[0].from", "did you mean 'human'"]),
        ({"conversations": [{"from": "human", "vlaue": "a"}]}, ["conversations[0]", "missing field 'value'", "vlaue"]),
        ({"conversations": [{"from": "human", "value": 1}]}, ["conversations[0].value", "expected string"]),
        ({"conversations": [{"from": 1, "value": "a"}]}, ["conversations[0].from", "expected string"]),
        ({"conversations": [{"from": "function_call", "value": "not json"}]}, ["value", "invalid JSON"]),
        ({"conversations": [{"from": "function_call", "value": "[]"}]}, ["value", "holds no call"]),
        ({"conversations": [{"role": "user", "content": "a"}]}, ["columns: {messages: conversations}"]),
        ({"conversations": [{"from": "system", "value": "a"}], "system": "b"}, ["system", "keep one"]),
    ],
)
def test_sharegpt_refuses(row: dict[str, Any], parts: list[str]) -> None:
    said = refusal("sharegpt", **row)
    assert all(part in said for part in parts), said


def test_alpaca() -> None:
    sample = read("alpaca", instruction="Add.", input="1 and 2", output="3", system="s", history=[["hi", "hello"]])
    assert sample.messages == turns(
        ("system", "s"), ("user", "hi"), ("assistant", "hello"), ("user", "Add.\n\n1 and 2"), ("assistant", "3")
    )
    for nothing in ({}, {"input": ""}, {"input": None}, {"input": " "}):
        assert read("alpaca", instruction="a", output="b", **nothing).messages == turns(
            ("user", "a"), ("assistant", "b")
        )
    assert "output: is empty" in refusal("alpaca", instruction="a", output="")
    assert "instruction: expected string" in refusal("alpaca", instruction=1, output="b")
    assert "history[0]" in refusal("alpaca", instruction="a", output="b", history=[["only one"]])
    assert "missing field 'output'" in refusal("alpaca", instruction="a", outptu="b")


def test_question_answer() -> None:
    sample = read("question_answer", question="2+2?", answer="4", system="s")
    assert sample.messages == turns(("system", "s"), ("user", "2+2?"), ("assistant", "4"))
    assert "did you mean 'anwser'" in refusal("question_answer", question="a", anwser="b")


def test_prompt_completion_stays_as_it_is() -> None:
    sample = read("prompt_completion", prompt=" a ", completion=" b\n")
    assert (sample.prompt, sample.completion, sample.messages) == (" a ", " b\n", None)
    assert read("prompt_completion", prompt="", completion="b").prompt == ""
    assert "completion: is empty" in refusal("prompt_completion", prompt="a", completion="")
    assert "expected string, found list" in refusal("prompt_completion", prompt=[USER], completion="b")


def test_text_stays_as_it_is() -> None:
    assert read("text", text=" a\n").text == " a\n"


def test_strict_json_reads_what_json_reads() -> None:
    value = {"a": [1, -2.5, 1e3, True, None, "\U0001f600", "\\ud83d \n"], "": {}}
    assert parse_json(json.dumps(value)) == value
    assert parse_json(' {"emoji": "\\ud83d\\ude00"} ') == {"emoji": "\U0001f600"}
    assert parse_json('{"brackets": "' + "[" * 5000 + '"}') == {"brackets": "[" * 5000}
    assert parse_json("[" * 100 + "]" * 100) is not None
    for text in ("", "{", "nul", "'a'", '{"a": 1,}', "[1 2]", '{"a": 01}', '"\t"', "NaN", "[" * 101 + "]" * 101):
        with pytest.raises(JsonError):
            parse_json(text)
