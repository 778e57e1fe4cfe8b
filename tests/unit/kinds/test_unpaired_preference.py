"""Rows of one answer with a verdict: every form in which data sets write them, and how the wrong ones are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorafit.errors import DataError
from lorafit.kinds.formats import formats

SYSTEM, USER = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
EARLIER, ANSWER = {"role": "assistant", "content": "hello"}, {"role": "assistant", "content": "a"}
STRINGS: dict[str, Any] = {"prompt": " q ", "completion": " a", "label": True}


def read(row: dict[str, Any]) -> Any:
    return formats.get("unpaired_preference").read(row, "d.jsonl", 3)


@pytest.mark.parametrize(
    ("label", "verdict"),
    [(True, "desirable"), (False, "undesirable"), ("true", "desirable"), ("False", "undesirable")],
)
def test_a_verdict_is_true_or_false_as_json_or_a_table_writes_it(label: Any, verdict: str) -> None:
    row = {**STRINGS, "label": label, "must_contain": "a"}
    sample = read(row)
    assert (sample.prompt, sample.completion, sample.messages, sample.labels) == (" q ", " a", None, (verdict,))
    assert (sample.must_contain, sample.line) == (("a",), 3)
    assert formats.get("unpaired_preference").matches(row)


@pytest.mark.parametrize("label", [1, 0, "yes", "good", 1.0, None, "", [True]])
def test_another_label_is_no_verdict(label: Any) -> None:
    row = {**STRINGS, "label": label}
    assert not formats.get("unpaired_preference").matches(row)
    with pytest.raises(DataError, match=r"label: expected true \(desirable\) or false \(undesirable\), found"):
        read(row)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": "q", "completion": [ANSWER]},
        {"prompt": [USER], "completion": "a"},
        {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},
    ],
)
def test_every_form_of_a_chat_is_the_same(row: dict[str, Any]) -> None:
    sample = read({**row, "label": False})
    assert (sample.messages, sample.completion, sample.prompt) == ((USER, ANSWER), None, "")
    asked = formats.get("unpaired_preference").read_prompt({**row, "label": False}, "d.jsonl", 3)
    assert (asked.turns, asked.labels) == ((USER,), None)


def test_what_an_assistant_said_in_the_prompt_carries_no_loss() -> None:
    sample = read({"prompt": [SYSTEM, USER, EARLIER, USER], "completion": [ANSWER], "label": True})
    assert sample.messages == (SYSTEM, USER, {**EARLIER, "weight": 0}, USER, ANSWER)


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"prompt": "q", "completion": "a"}, ["missing field 'label'"]),
        ({"completion": "a", "label": True}, ["missing field 'prompt'"]),
        ({"prompt": "q", "label": True}, ["missing field 'completion'"]),
        ({**STRINGS, "completion": " "}, ["completion", "is empty"]),
        ({**STRINGS, "prompt": ""}, ["prompt", "is empty"]),
        ({**STRINGS, "completion": 3}, ["completion: expected string, found integer 3"]),
        ({**STRINGS, "prompt": [USER], "completion": 3}, ["completion: expected string or list of turns"]),
        ({**STRINGS, "completion": [USER, ANSWER]}, ["completion: begins with a turn of the user", "the answer alone"]),
        ({**STRINGS, "completion": [{**ANSWER, "weight": 0}]}, ["completion: has no turn that carries loss"]),
        ({**STRINGS, "prompt": [SYSTEM]}, ["prompt: asks nothing"]),
        ({**STRINGS, "prompt": []}, ["prompt: is empty"]),
    ],
)
def test_a_wrong_row_is_refused(row: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read(row)
    assert [part for part in parts if part not in str(caught.value)] == []
