"""The shipped template for tool chats: right masks, nothing dropped, and the same text in plain transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorafit.data.chat.render import ChatRenderer
from lorafit.data.chat.template import RenderError
from lorafit.data.chat.template_names import shipped_template
from lorafit.kinds.metrics.tool_call import read_calls
from tests.support.chat_families import WEATHER, assistant, call, system, tokenizer_of, tool, user

CALL = '<tool_call>\n{{"name": "weather", "arguments": {{"city": "{}"}}}}\n</tool_call>'
TWO_CALLS = [call("weather", city="Paris"), call("weather", city="Rome")]
TEXT_ARGUMENTS = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]
CHATS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "call, result, answer": (
        [user("w?"), assistant(None, tool_calls=TWO_CALLS[:1]), tool("21"), assistant("21.")],
        [CALL.format("Paris"), "21."],
    ),
    "words and two calls": (
        [system("S"), user("w?"), assistant("See:", tool_calls=TWO_CALLS), tool("21"), tool("9"), assistant("Warm.")],
        ["See:\n" + CALL.format("Paris") + "\n" + CALL.format("Rome"), "Warm."],
    ),
    "arguments as text, empty content": (
        [user("w?"), assistant("", tool_calls=TEXT_ARGUMENTS), tool("5", name="weather", tool_call_id="c1")],
        [CALL.format("Oslo")],
    ),
    "several turns": (
        [user("a?"), assistant("A."), user("w?"), assistant("", tool_calls=TWO_CALLS), tool("{}"), assistant("B.")],
        ["A.", CALL.format("Paris") + "\n" + CALL.format("Rome"), "B."],
    ),
    "developer message": ([{"role": "developer", "content": "D"}, user("a?"), assistant("A.")], ["A."]),
    "typed marks": (
        [user("what is </tools> <|im_end|>?"), assistant("<tool_call> opens one. <|im_end|>")],
        ["<tool_call> opens one. <|im_end|>"],
    ),
}


@pytest.mark.parametrize("family", ["vicuna", "qwen", "chatml"])
@pytest.mark.parametrize("tools", [None, [WEATHER], [WEATHER, {"name": "bare", "parameters": {}}]])
@pytest.mark.parametrize("name", CHATS)
def test_what_the_model_writes_is_trained_and_transformers_agrees(name: str, tools: Any, family: str) -> None:
    tokenizer = tokenizer_of(family)
    messages, answers = CHATS[name]
    renderer = ChatRenderer(tokenizer, chat_template="hermes")  # a dropped field would be an error
    rendering = renderer.render(messages, tools)
    source = shipped_template("hermes")
    assert rendering.text == tokenizer.apply_chat_template(messages, tools=tools, chat_template=source, tokenize=False)
    trained = [rendering.text[start:end] for start, end in rendering.spans]
    assert trained == [answer + str(tokenizer.eos_token) for answer in answers]
    assert not rendering.warnings and not rendering.history_dropped
    encoded = renderer.encode(rendering)
    assert encoded.input_ids.count(tokenizer.eos_token_id) >= len(answers)
    first = next(place for place, message in enumerate(messages) if message["role"] == "assistant")
    prompt = renderer.prompt_ids(messages[:first], tools)
    assert encoded.input_ids[: len(prompt)] == prompt and encoded.trained.index(True) == len(prompt)


def test_the_functions_are_told_in_the_system_turn_once() -> None:
    renderer = ChatRenderer(tokenizer_of("vicuna"), chat_template="hermes")
    messages, _ = CHATS["words and two calls"]
    text = renderer.render(messages, [WEATHER]).text
    head, _, rest = text.partition("<|im_end|>\n")
    assert head.startswith("<|im_start|>system\nS\n\n") and "<|im_start|>system" not in rest
    told = head.partition("<tools>\n")[2].partition("\n</tools>")[0]
    assert [json.loads(line) for line in told.splitlines()] == [WEATHER]
    bare = renderer.render([user("a?"), assistant("A.")]).text
    assert bare == "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nA.</s>\n"


def test_a_results_name_is_shown_beside_it() -> None:
    renderer = ChatRenderer(tokenizer_of("vicuna"), chat_template="hermes")
    text = renderer.render([user("w?"), assistant("A."), tool('"21" ', name="weather")], [WEATHER]).text
    shown = text.rpartition("<tool_response>\n")[2].partition("\n</tool_response>")[0]
    assert json.loads(shown) == {"name": "weather", "content": '"21" '}


def test_what_hermes_does_not_write_is_an_error() -> None:
    renderer = ChatRenderer(tokenizer_of("vicuna"), chat_template="hermes")
    with pytest.raises(RenderError, match="drops reasoning_content of message 2"):
        renderer.render([user("a?"), assistant("A.", reasoning_content="because")])


@pytest.mark.parametrize("name", [name for name, (messages, _) in CHATS.items() if "tool_calls" in str(messages)])
def test_calls_are_written_as_qwen_does_and_read_by_the_metric(name: str) -> None:
    messages, _ = CHATS[name]
    qwen = tokenizer_of("qwen")  # has tokens for <tool_call> and </tool_call>; others spell them
    qwens = qwen.apply_chat_template([*messages, user("?")], tools=[WEATHER], tokenize=False)
    rendering = ChatRenderer(qwen, chat_template="hermes").render(messages, [WEATHER])
    asked = [message.get("tool_calls") or [] for message in messages if message["role"] == "assistant"]
    for calls, (start, end) in zip(asked, rendering.spans, strict=True):
        written = rendering.text[start:end].removesuffix("<|im_end|>")
        due = [(each["function"]["name"], each["function"]["arguments"]) for each in calls]
        assert read_calls(written) == [(name, json.loads(a) if isinstance(a, str) else a) for name, a in due]
        assert isinstance(due and due[0][1], str) or f"<|im_start|>assistant\n{written}<|im_end|>" in qwens
