"""What a request's fields become, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from lorafit.answering.sampling import Sampling
from lorafit.serving.errors import of_validation
from lorafit.serving.schemas import ChatBody, CompletionBody, GenerateBody

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "q"}]}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"seed": 3}, Sampling(9, 1.0, 1.0, 3)),  # OpenAI's own default of temperature
        ({"seed": 3, "temperature": 0}, Sampling(9, 0.0, 1.0, 3)),
        ({"seed": 3, "temperature": 0, "top_p": 0.5}, Sampling(9, 0.0, 1.0, 3)),  # greedy reads no nucleus
        ({"seed": 3, "temperature": 0.5, "top_p": 0}, Sampling(9, 0.5, 0.001, 3)),
        ({"seed": -1}, Sampling(9, 1.0, 1.0, (1 << 63) - 1)),
    ],
)
def test_how_tokens_are_chosen(given: dict[str, Any], expected: Sampling) -> None:
    assert ChatBody(**CHAT, **given).sampling(9) == expected


def test_generate_is_greedy_as_the_command_is() -> None:
    assert GenerateBody(prompt="q", seed=0).sampling(9) == Sampling(9)
    assert GenerateBody(prompt="q", temperature=1).sampling(9).seed != GenerateBody(prompt="q").sampling(9).seed


@pytest.mark.parametrize(
    ("given", "longest"),
    [({}, None), ({"max_tokens": 5}, 5), ({"max_completion_tokens": 6}, 6)],
)
def test_either_name_of_the_longest_answer(given: dict[str, int], longest: int | None) -> None:
    assert ChatBody(**CHAT, **given).longest == longest


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_prompts_of_completions(prompt: Any, prompts: Any) -> None:
    assert CompletionBody(model="m", prompt=prompt).prompt == prompts


@pytest.mark.parametrize("prompt", [[], [[]], 3, None, {}, [True], [-1], [1 << 31], [1.0], ["a", 1], [[1], "a", []]])
def test_what_is_no_prompt(prompt: Any) -> None:
    assert refused(CompletionBody, model="m", prompt=prompt) == (
        "prompt",
        "prompt: is neither a text nor token ids, nor a list of such",
    )


@pytest.mark.parametrize(
    "given",
    [
        {"presence_penalty": 0.0},
        {"frequency_penalty": 0},
        {"repetition_penalty": 1.0},
        {"top_k": -1},
        {"user": "u"},
        {"response_format": {"type": "text"}},
        {"functions": None, "prediction": None, "modalities": ["text"], "logit_bias": {}},
        {"top_logprobs": 0},
        {"stream": True, "stream_options": {"include_usage": None}},
    ],
)
def test_what_changes_nothing_is_taken(given: dict[str, Any]) -> None:
    ChatBody(**CHAT, **given)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"top_k": 5}, "top_k"),
        ({"min_p": 0.1}, "min_p"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ],
)
def test_what_would_change_an_answer_and_is_not_served_is_refused(given: dict[str, Any], param: str) -> None:
    told = refused(ChatBody, **CHAT, **given)
    assert told[0] == param and told[1].startswith(f"{param}: ")
    if param != "tool_choice":
        assert "is not served here; leave it out" in told[1]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"top_logprobs": 3}, "top_logprobs: is only beside log-probabilities"),
        ({"top_logprobs": 3, "logprobs": False}, "top_logprobs: is only beside log-probabilities"),
        ({"stream_options": {"include_usage": True}}, "stream_options: is only for a stream"),
        ({"stop": ["a"] * 100}, "stop: has more than 16 entries; send fewer"),
        ({"stop": ""}, "stop.0: is an empty text"),
        ({"stop": 3}, "stop: is no list"),
        ({"messages": []}, "messages: is an empty list; send at least 1"),
        ({"temperature": float("nan")}, "temperature: is no finite number"),
        ({"temperature": 11}, "temperature: is more than 10, the most that is taken"),
        ({"n": 0}, "n: is less than 1, the least that is taken"),
        ({"max_tokens": 5, "max_completion_tokens": 7}, "max_completion_tokens: is 7, and max_tokens is 5"),
    ],
)
def test_what_says_nothing_alone_or_too_much_is_refused(given: dict[str, Any], says: str) -> None:
    assert refused(ChatBody, **{**CHAT, **given})[1].startswith(says)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"temperature": "0.5"}, "is no number"),
        ({"temperature": True}, "is no number"),
        ({"max_tokens": "5"}, "is no whole number"),
        ({"n": 2.0}, "is no whole number"),
        ({"stream": "yes"}, "is neither true nor false"),
        ({"user": 3}, "is no text"),
    ],
)
def test_another_type_is_not_guessed_at(given: dict[str, Any], says: str) -> None:
    [name] = given
    assert refused(ChatBody, **CHAT, **given)[1] == f"{name}: {says}"


def refused(form: Any, **fields: Any) -> tuple[str | None, str]:
    """The field that a form refuses, and what is told."""
    with pytest.raises(ValidationError) as refusal:
        form(**fields)
    told = of_validation(refusal.value.errors(), ())  # type: ignore[arg-type]
    assert told.status == 400
    return told.param, told.message
