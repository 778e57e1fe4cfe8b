"""Single answers with a verdict: `{"prompt": ..., "completion": ..., "label": true}`, as strings or lists of messages.

{"prompt": "q", "completion": "a", "label": true}              verbatim text, unless the recipe has a template
{"prompt": [turn, ...], "completion": [turn], "label": false}  a chat; either may be a string beside
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lorafit.contracts import JsonValue, Sample
from lorafit.errors import DataError
from lorafit.kinds.chat_fields import (
    assistant_turn,
    is_chat,
    read_side,
    read_tools,
    says_something,
    user_turn,
    without_loss,
)
from lorafit.kinds.fields import Row, missing_field, read_filled_string, read_must_contain, wrong_type
from lorafit.kinds.formats import Format, formats

_VERDICTS = {"true": "desirable", "false": "undesirable"}


@formats.register("unpaired_preference")
class UnpairedPreference(Format):
    """A prompt with one answer, and whether that is wanted; as strings verbatim, as messages a chat."""

    priority = 45
    fields: Mapping[str, bool] = {
        "prompt": True,
        "completion": True,
        "label": True,
        "tools": False,
        "must_contain": False,
    }
    answer = "completion"
    known_as: Mapping[str, tuple[str, ...]] = {
        "prompt": ("question", "instruction", "query", "input"),
        "completion": ("response", "output", "answer"),
        "label": ("labels", "desirable", "is_desirable", "thumbs_up", "verdict", "liked"),
    }
    verbatim = True

    def matches(self, row: Row) -> bool:
        """Whether the label is a verdict; other labels say something else of a prompt and its completion."""
        return super().matches(row) and _verdict(row["label"]) is not None

    def read(self, row: Row, file: str, line: int) -> Sample:
        """The answer to the prompt; only it carries loss, whatever of the prompt an assistant said."""
        for name in ("prompt", "completion", "label"):
            if name not in row:
                raise missing_field(name, row)
        verdict = _verdict(row["label"])
        if verdict is None:
            raise wrong_type("label", "true (desirable) or false (undesirable)", row["label"])
        asked = self.read_prompt(row, file, line)
        labelled = replace(asked, labels=(verdict,))
        if asked.messages is None and not is_chat(row["completion"]):
            return replace(labelled, completion=read_filled_string(row, "completion"))
        answer = read_side(row, "completion", assistant_turn)
        if answer[0]["role"] != "assistant":
            what = f"begins with a turn of the {answer[0]['role']}"
            raise DataError(what, key="completion", todo="it holds the answer alone, and the prompt what is asked")
        if not any(turn["role"] == "assistant" and turn.get("weight", 1) and says_something(turn) for turn in answer):
            todo = "every turn is empty or has weight 0; correct or remove the row"
            raise DataError("has no turn that carries loss", key="completion", todo=todo)
        return replace(labelled, prompt="", messages=(*without_loss(asked.turns), *answer))

    def read_prompt(self, row: Row, file: str, line: int) -> Sample:
        """What is asked, without the answer."""
        if "prompt" not in row:
            raise missing_field("prompt", row)
        whole = Sample(file, line, tools=read_tools(row), must_contain=read_must_contain(row))
        if isinstance(row["prompt"], str) and not is_chat(row["prompt"]):
            return replace(whole, prompt=read_filled_string(row, "prompt"))
        turns = read_side(row, "prompt", user_turn)
        if all(turn["role"] in ("system", "developer") for turn in turns):
            raise DataError("asks nothing", key="prompt", todo="add the turn that asks")
        return replace(whole, messages=turns)


def _verdict(value: JsonValue) -> str | None:
    """The verdict that a label says, as JSON or as a table holds it; None for none."""
    return _VERDICTS.get(str(value).strip().lower()) if isinstance(value, bool | str) else None
