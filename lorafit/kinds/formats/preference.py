"""Two answers to one prompt: `{"prompt": ..., "chosen": ..., "rejected": ...}`, as strings or as lists of messages.

{"prompt": "q", "chosen": "a", "rejected": "b"}                        verbatim text, unless the recipe has a template
{"prompt": [turn, ...], "chosen": [turn], "rejected": [turn]}          a chat
{"chosen": [turn, ..., turn], "rejected": [turn, ..., turn]}           a chat: what both begin with is the prompt
{"prompt": "q", "chosen": [turn, ...], "rejected": [turn, ...]}        the same; the prompt must be among what is asked
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile

from lorafit.contracts import Message, Sample
from lorafit.errors import DataError
from lorafit.kinds.chat_fields import (
    assistant_turn,
    is_chat,
    read_side,
    read_tools,
    read_turns,
    user_turn,
    without_loss,
)
from lorafit.kinds.fields import Row, missing_field, read_filled_string, read_must_contain
from lorafit.kinds.formats import Format, formats

_ANSWERS = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class _Chats:
    """What both chats begin with, and what is answered in each."""

    asked: tuple[Message, ...]
    answers: tuple[tuple[Message, ...], tuple[Message, ...]]


@formats.register("preference")
class Preference(Format):
    """A prompt with the answer that is wanted and one that is not; as strings verbatim, as messages a chat."""

    priority = 70
    fields: Mapping[str, bool] = {
        "prompt": False,
        "chosen": True,
        "rejected": True,
        "tools": False,
        "must_contain": False,
    }
    answer = "chosen"
    rewordable = frozenset({"prompt"})
    known_as: Mapping[str, tuple[str, ...]] = {
        "prompt": ("question", "instruction", "query", "input"),
        "chosen": ("preferred", "accepted", "winner", "good", "better"),
        "rejected": ("dispreferred", "loser", "bad", "worse"),
    }
    verbatim = True

    def matches(self, row: Row) -> bool:
        """Whether the row has one of the answers: `read` says what is missing."""
        return any(name in row for name in _ANSWERS)

    def read(self, row: Row, file: str, line: int) -> Sample:
        """Both answers to the prompt; only they carry loss, whatever of the prompt an assistant said."""
        for name in _ANSWERS:
            if name not in row:
                raise missing_field(name, row)
        if row["chosen"] == row["rejected"]:
            raise DataError("is the same as chosen: there is nothing to prefer", key="rejected")
        whole = Sample(file, line, tools=read_tools(row), must_contain=read_must_contain(row))
        if not any(map(is_chat, (row.get("prompt"), row["chosen"], row["rejected"]))):
            if "prompt" not in row:
                raise missing_field("prompt", row)
            whole = replace(whole, prompt=read_filled_string(row, "prompt"))
            chosen, rejected = (replace(whole, completion=read_filled_string(row, name)) for name in _ANSWERS)
        else:
            chats = _read_chats(row)
            chosen, rejected = (replace(whole, messages=(*chats.asked, *answer)) for answer in chats.answers)
        return replace(chosen, rejected=rejected)

    def read_prompt(self, row: Row, file: str, line: int) -> Sample:
        """What is asked, without either answer."""
        if all(name in row for name in _ANSWERS):
            chosen = self.read(row, file, line)
            asked = _read_chats(row).asked if chosen.messages is not None else None
            return replace(chosen, messages=asked, completion=None, rejected=None)
        if "prompt" not in row:
            raise missing_field("prompt", row)
        whole = Sample(file, line, tools=read_tools(row), must_contain=read_must_contain(row))
        if is_chat(row["prompt"]):
            return replace(whole, messages=read_turns(row, "prompt"))
        return replace(whole, prompt=read_filled_string(row, "prompt"))


def _read_chats(row: Row) -> _Chats:
    """Prompt and answers as turns.

    Raises:
        DataError: A turn is none, or the chats differ where the prompt asks.
    """
    named = read_side(row, "prompt", user_turn) if row.get("prompt") is not None else ()
    chosen, rejected = (read_side(row, name, assistant_turn) for name in _ANSWERS)
    if chosen and rejected and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        asked, answers = named, (chosen, rejected)
    else:
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
        asked, answers = chosen[:shared], (chosen[shared:], rejected[shared:])
        if any(turn not in asked for turn in named):
            what = "is not what chosen and rejected begin with"
            raise DataError(what, key="prompt", todo="correct it, or let both hold the answer alone")
    if not any(turn["role"] not in ("system", "developer") for turn in asked):
        raise DataError("chosen and rejected answer nothing", key="prompt", todo="add the turn that asks")
    for name, answer in zip(_ANSWERS, answers, strict=True):
        if not answer or answer[0]["role"] != "assistant":
            what = "has no answer of its own" if not answer else "differs from the other answer in what is asked"
            raise DataError(what, key=name, todo="both must answer the same turns, each with a turn of the assistant")
    return _Chats(without_loss(asked), answers)
