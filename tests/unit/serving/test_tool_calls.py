"""Calls of tools are found in the form that is known, however the answer is cut into pieces; all else stays text."""

from __future__ import annotations

import json
import time

import pytest

from lorafit.data.chat.template_names import shipped_template
from lorafit.serving.tool_calls import CallReader, writes_calls

CALL = '<tool_call>\n{"name": "price", "arguments": {"of": "mug"}}\n</tool_call>'


def read(*pieces: str) -> tuple[str, list[tuple[str, object]]]:
    """The text that is shown, and the calls with their arguments."""
    reader = CallReader()
    shown = "".join(reader.add(piece) for piece in pieces) + reader.end()
    calls = [call["function"] for call in reader.calls]
    return shown, [(call["name"], json.loads(call["arguments"])) for call in calls]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_calls_are_taken_out_of_any_pieces(size: int) -> None:
    text = f"Let me look.\n{CALL}\n{CALL.replace('mug', 'bowl')}"
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert read(*pieces) == ("Let me look.\n", [("price", {"of": "mug"}), ("price", {"of": "bowl"})])


@pytest.mark.parametrize(
    "text",
    [
        "a < b and <tool_",
        "<tool_call>price(mug)</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>[]",
        "<tool_call>" + "[" * 100_000,
        f"{CALL}<tool_call>price(mug)</tool_call>",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert read(*text) == (text, [])


def test_blanks_within_a_call_take_no_time() -> None:
    """A model that has lost its way writes them by the thousand, while all others wait."""
    reader = CallReader()
    reader.add("<tool_call>x" + " " * 20_000 + "x")
    began = time.perf_counter()
    reader.end()
    assert time.perf_counter() - began < 0.1


def test_a_mark_within_an_argument_is_part_of_it() -> None:
    assert read(CALL.replace("mug", "<tool_call>")) == ("", [("price", {"of": "<tool_call>"})])


def test_text_is_shown_as_soon_as_it_can_be_no_call() -> None:
    reader = CallReader()
    assert [reader.add(piece) for piece in ("a<", "b", "<tool", "box>")] == ["a", "<b", "", "<toolbox>"]


def test_each_call_has_an_id_of_its_own() -> None:
    reader = CallReader()
    reader.add(CALL * 2)
    reader.end()
    assert len({call["id"] for call in reader.calls}) == 2


def test_the_form_is_known_by_the_template() -> None:
    assert writes_calls(shipped_template("hermes"))
    assert not writes_calls(shipped_template("chatml"))
