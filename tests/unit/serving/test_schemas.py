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
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]])],
)
def test_prompts_of_completions(prompt: Any, prompts: Any) -> None:
    assert CompletionBody(model="m", prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    "given",
    [{"presence_penalty": 0.0}, {"frequency_penalty": 0}, {"user": "u"}, {"response_format": {"type": "text"}}],
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
    ],
)
def test_what_would_change_an_answer_and_is_not_served_is_refused(given: dict[str, Any], param: str) -> None:
    with pytest.raises(ValidationError) as refused:
        ChatBody(**CHAT, **given)
    told = of_validation(refused.value.errors(), ())  # type: ignore[arg-type]
    assert (told.status, told.param) == (400, param)
