"""Rows of two answers: every form in which data sets write them, and how the wrong ones are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorafit.errors import DataError
from lorafit.kinds.formats import formats

SYSTEM, USER = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
EARLIER = {"role": "assistant", "content": "hello"}
GOOD, BAD = {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
CHATS: list[dict[str, Any]] = [
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [USER], "chosen": "a", "rejected": "b"},
    {"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])},
]


def read(row: dict[str, Any]) -> Any:
    return formats.get("preference").read(row, "d.jsonl", 3)


@pytest.mark.parametrize("row", CHATS)
def test_every_form_of_a_chat_is_the_same_pair(row: dict[str, Any]) -> None:
    sample = read(row)
    assert (sample.messages, sample.rejected.messages) == ((USER, GOOD), (USER, BAD))
    assert (sample.completion, sample.rejected.rejected, sample.rejected.line) == (None, None, 3)
    assert formats.get("preference").read_prompt(row, "d.jsonl", 3).messages == (USER,)


def test_what_an_assistant_said_in_the_prompt_carries_no_loss() -> None:
    asked = [SYSTEM, USER, EARLIER, USER]
    sample = read({"chosen": [*asked, GOOD], "rejected": [*asked, BAD], "must_contain": "a"})
    silent = (SYSTEM, USER, {**EARLIER, "weight": 0}, USER)
    assert (sample.messages, sample.rejected.messages) == ((*silent, GOOD), (*silent, BAD))
    assert sample.must_contain == ("a",)


def test_strings_stay_as_they_are() -> None:
    row = {"prompt": " q ", "chosen": " a", "rejected": "[b"}
    sample = read(row)
    assert [(side.prompt, side.completion, side.messages) for side in (sample, sample.rejected)] == [
        (" q ", " a", None),
        (" q ", "[b", None),
    ]
    asked = formats.get("preference").read_prompt(row, "d.jsonl", 3)
    assert (asked.prompt, asked.completion, asked.rejected) == (" q ", None, None)


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"prompt": "q", "chosen": "a"}, ["missing field 'rejected'", "prompt, chosen"]),
        ({"prompt": "q", "rejected": "a"}, ["missing field 'chosen'"]),
        ({"chosen": "a", "rejected": "b"}, ["missing field 'prompt'"]),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, ["rejected: is the same as chosen"]),
        ({"prompt": "q", "chosen": "a", "rejected": 3}, ["rejected: expected string, found integer 3"]),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, ["rejected", "empty"]),
        ({"prompt": "q", "chosen": [GOOD], "rejected": {"role": "b"}}, ["rejected: expected string or list of turns"]),
        ({"prompt": 1, "chosen": [GOOD], "rejected": [BAD]}, ["prompt: expected string or list of turns"]),
        ({"chosen": [GOOD], "rejected": [BAD]}, ["answer nothing", "add the turn that asks"]),
        ({"chosen": [USER], "rejected": [USER, BAD]}, ["chosen: has no answer of its own"]),
        ({"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, ["answer nothing"]),
        ({"chosen": [SYSTEM, USER, USER], "rejected": [SYSTEM, USER, BAD]}, ["chosen: differs", "what is asked"]),
        ({"prompt": "p", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, ["prompt: is not what chosen and rejected"]),
        ({"prompt": "q", "chosen": [{"role": "bot", "content": "a"}], "rejected": [BAD]}, ["chosen[0].role", "assist"]),
        ({"prompt": "q", "chosen": [], "rejected": [BAD]}, ["chosen: is empty"]),
    ],
)  # fmt: skip
def test_a_wrong_pair_is_refused(row: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read(row)
    assert [part for part in parts if part not in str(caught.value)] == []
