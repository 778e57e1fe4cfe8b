"""A good row of each format, and rows of it that are wrong in ways of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PART = "messages[0].content[0]"
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


def picture(**named: Any) -> Row:
    """A turn of an image."""
    return {**USER, "content": [{"type": "image", **named}]}


@dataclass(frozen=True)
class Rows:
    """Rows of one format.

    Attributes:
        good: Every required field as it should be. Rows that lack one of them, or have another type in its place, need
            not be listed.
        bad: By what is wrong, changes to the good row and the key that the error must name.
        other: Changes that make another good row, where a task can do nothing with equal ones.
        may_be_empty: Required fields that may.
        may_be: Other types that a required field may be of.
        task: Options of the task that learns the rows.
    """

    good: Row
    bad: Mapping[str, tuple[Row, str]]
    other: Row = field(default_factory=dict)
    may_be_empty: frozenset[str] = frozenset()
    may_be: Mapping[str, tuple[type, ...]] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)


BAD_ROWS = {
    "messages": Rows(
        {"messages": [USER, ANSWER]},
        {
            "no answer": ({"messages": [USER]}, "messages"),
            "an answer that is empty": ({"messages": [USER, {**ANSWER, "content": ""}]}, "messages"),
            "an unknown role": ({"messages": [{**USER, "role": "usr"}, ANSWER]}, "messages[0].role"),
            "a content that is a number": ({"messages": [USER, {**ANSWER, "content": 1}]}, "messages[1].content"),
            "a turn that is a string": ({"messages": ["q", ANSWER]}, "messages[0]"),
            "a turn without a role": ({"messages": [USER, {"content": "a"}]}, "messages[1]"),
            "a turn without a content": ({"messages": [USER, {"role": "assistant"}]}, "messages[1]"),
            "a weight that is none": ({"messages": [USER, {**ANSWER, "weight": 2}]}, "messages[1].weight"),
            "tools that are none": ({"tools": "web"}, "tools"),
        },
    ),
    "image_messages": Rows(
        {"messages": [USER, ANSWER]},
        {
            "no answer": ({"messages": [USER]}, "messages"),
            "an answer that is empty": ({"messages": [USER, {**ANSWER, "content": []}]}, "messages[1].content"),
            "an image that is none": ({"messages": [picture(path=1), ANSWER]}, "messages[0].content[0].path"),
            "an image that is an address": ({"messages": [picture(url="http://x/a.png"), ANSWER]}, f"{PART}.url"),
            "an image's place without one": ({"messages": [picture(), ANSWER]}, PART),
            "an image without a place": ({"images": ["a.png"]}, "images"),
            "images that are none": ({"images": 3}, "images"),
            "a video": ({"messages": [{**USER, "content": [{"type": "video"}]}, ANSWER]}, PART),
        },
    ),
    "sharegpt": Rows(
        {"conversations": [HUMAN, GPT]},
        {
            "no answer": ({"conversations": [HUMAN]}, "messages"),
            "an answer that is empty": ({"conversations": [HUMAN, {**GPT, "value": " "}]}, "messages"),
            "an unknown speaker": ({"conversations": [{**HUMAN, "from": "hooman"}, GPT]}, "conversations[0].from"),
            "a value that is a number": ({"conversations": [HUMAN, {**GPT, "value": 1}]}, "conversations[1].value"),
            "a turn without a value": ({"conversations": [HUMAN, {"from": "gpt"}]}, "conversations[1]"),
            "two system messages": (
                {"system": "be kind", "conversations": [{"from": "system", "value": "be rude"}, HUMAN, GPT]},
                "system",
            ),
        },
    ),
    "alpaca": Rows(
        {"instruction": "q", "output": "a"},
        {"a history that is none": ({"history": [["q"]]}, "history[0]")},
    ),
    "question_answer": Rows(
        {"question": "q", "answer": "a"},
        {"a system message that is a list": ({"system": ["be kind"]}, "system")},
    ),
    "prompt_completion": Rows(
        {"prompt": "q", "completion": "a"},
        {"a verdict that is a list": ({"must_contain": [1]}, "must_contain")},
        may_be_empty=frozenset({"prompt"}),
    ),
    "preference": Rows(
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {
            "chosen is rejected": ({"rejected": "a"}, "rejected"),
            "no prompt": ({"prompt": None}, "prompt"),
            "an empty prompt": ({"prompt": " "}, "prompt"),
            "chats that ask something else": (
                {"prompt": None, "chosen": [USER, ANSWER], "rejected": [{**USER, "content": "x"}, ANSWER]},
                "prompt",
            ),
            "a chat whose answer is empty": (
                {"prompt": None, "chosen": [USER, {**ANSWER, "content": ""}], "rejected": [USER, ANSWER]},
                "messages",
            ),
            "a chat without an answer": ({"prompt": None, "chosen": [USER], "rejected": [USER, ANSWER]}, "chosen"),
        },
    ),
    "text": Rows({"text": "a"}, {"what it must contain is a number": ({"must_contain": 3}, "must_contain")}),
    "text_label": Rows(
        {"text": "a", "label": "x"},
        {
            "a label that is none of them": ({"label": "xx"}, "label"),
            "two labels, where one is learnt": ({"label": ["x", "y"]}, "label"),
            "a label twice": ({"label": ["x", "x"]}, "label"),
            "no label": ({"label": []}, "label"),
            "a label that is a fraction": ({"label": 0.5}, "label"),
            "a second text that is empty": ({"text_pair": " "}, "text_pair"),
        },
        other={"label": "y"},
        may_be={"label": (int, bool)},
        task={"labels": ["x", "y"]},
    ),
    "unpaired_preference": Rows(
        {"prompt": "q", "completion": "a", "label": True},
        {
            "a verdict that is a number": ({"label": 1}, "label"),
            "a verdict in another word": ({"label": "yes"}, "label"),
            "an answer that begins with a question": ({"prompt": [USER], "completion": [USER, ANSWER]}, "completion"),
            "an answer without weight": ({"prompt": [USER], "completion": [{**ANSWER, "weight": 0}]}, "completion"),
            "an answer that is empty": ({"prompt": [USER], "completion": [{**ANSWER, "content": ""}]}, "completion"),
            "a prompt that asks nothing": ({"prompt": [{**USER, "role": "system"}]}, "prompt"),
        },
        other={"prompt": "another q", "label": "false"},
        may_be_empty=frozenset({"label"}),
        may_be={"label": (bool,)},
    ),
    "text_score": Rows(
        {"text": "a", "score": 0.5},
        {
            "a score that is a word": ({"score": "high"}, "score"),
            "a score that is no number": ({"score": "nan"}, "score"),
            "a score with a comma": ({"score": " 3,5"}, "score"),
            "no score": ({"score": []}, "score"),
            "two scores, where one is predicted": ({"score": [1, 2]}, "score"),
            "a second text that is a number": ({"text_pair": 3}, "text_pair"),
            "a second text that is empty": ({"text_pair": ""}, "text_pair"),
        },
        other={"score": 1.5},
        may_be={"score": (int,)},
    ),
    "word_labels": Rows(
        {"words": ["a", "b"], "labels": ["O", "B-X"]},
        {
            "a tag too few": ({"labels": ["O"]}, "labels"),
            "a tag too many": ({"labels": ["O", "O", "O"]}, "labels"),
            "a tag that is none of them": ({"labels": ["O", "B-Y"]}, "labels"),
            "a tag that is empty": ({"labels": ["O", ""]}, "labels"),
            "a tag that is null": ({"labels": ["O", None]}, "labels"),
            "a word that is a number": ({"words": ["a", 1]}, "words"),
            "a word that is blank": ({"words": ["a", " "]}, "words"),
            "no words": ({"words": [], "labels": []}, "words"),
        },
        task={"labels": ["O", "B-X", "I-X"]},
    ),
    "source_target": Rows(
        {"source": "q", "target": "a"},
        {"what it must contain is a number": ({"must_contain": 3}, "must_contain")},
    ),
}
