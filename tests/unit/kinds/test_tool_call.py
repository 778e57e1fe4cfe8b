"""Tool calls are read from the forms that models write, and compared as JSON."""

from __future__ import annotations

import time

import pytest

from lorafit.kinds.metrics import RowScore, metrics, with_companions
from lorafit.kinds.metrics.tool_call import read_calls

TWO = [("f", {"a": 1, "b": "x y"}), ("g", {})]
SEP, BEGIN, END = "<｜tool▁sep｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
FORMS = {
    "hermes": 'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "x y"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
    "hermes, arguments as a string": r'<tool_call>{"name": "f", "arguments": "{\"b\": \"x y\", \"a\": 1}"}</tool_call>'
    '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
    "qwen3 coder": "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx y\n</parameter>\n"
    "</function>\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call>",
    "glm": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\n"
    "<arg_value>x y</arg_value>\n</tool_call>\n<tool_call>g\n</tool_call>",
    "phi": '<|tool_call|>[{"name": "f", "arguments": {"a": 1, "b": "x y"}}, {"name": "g", "arguments": {}}]'
    "<|/tool_call|>",
    "llama": '{"name": "f", "parameters": {"a": 1, "b": "x y"}}; {"name": "g", "parameters": {}}',
    "llama with its tag": '<|python_tag|>{"name": "f", "parameters": {"b": "x y", "a": 1.0}}\n'
    '{"type": "function", "function": {"name": "g", "parameters": {}}}',
    "mistral": '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1, "b": "x y"}, "id": "012345678"}, '
    '{"name": "g", "arguments": {}, "id": "012345679"}]',
    "mistral, later": '[TOOL_CALLS]f[ARGS]{"a": 1, "b": "x y"}[TOOL_CALLS]g[CALL_ID]0123[ARGS]{}',
    "deepseek": f'<｜tool▁calls▁begin｜>{BEGIN}function{SEP}f\n```json\n{{"a": 1, "b": "x y"}}\n```{END}\n'
    f"{BEGIN}function{SEP}g\n```json\n{{}}\n```{END}<｜tool▁calls▁end｜>",
    "deepseek, later": f'<｜tool▁calls▁begin｜>{BEGIN}f{SEP}{{"a": 1, "b": "x y"}}{END}{BEGIN}g{SEP}{{}}{END}'
    "<｜tool▁calls▁end｜>",
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
    '{"a": 1, "b": "x y"}<|tool_call_end|><|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>{}'
    "<|tool_call_end|><|tool_calls_section_end|>",
    "harmony": '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1, "b": "x y"}<|call|>'
    "<|start|>assistant<|channel|>commentary to=functions.g <|constrain|>json<|message|>{}<|call|>",
}


def scored(name: str, reference: str, written: str, calls: tuple[str, ...] = ()) -> float | None:
    """The metric's value of one row; None where it leaves the row out."""
    metric = metrics.get(name)
    row = RowScore({}, "", reference, written=written, calls=calls)
    return next(iter(metric.values(metric.row_sums([row])[0]).values())) if metric.usable(row) else None


@pytest.mark.parametrize("form", FORMS)
def test_calls_are_read_in_every_form(form: str) -> None:
    assert read_calls(FORMS[form]) == TWO
    assert read_calls(f"<think>{FORMS['hermes'][:40]}</think>\n{FORMS[form]}") == TWO
    assert scored("tool_call", FORMS[form], FORMS[form], ("f", "g")) == 1.0
    assert scored("tool_call", FORMS[form], FORMS[form].replace("x y", "x z"), ("f", "g")) == 0.0


@pytest.mark.parametrize("form", [name for name in FORMS if name not in ("qwen3 coder", "glm")])
def test_what_was_cut_or_is_no_json_is_wrong_and_an_attempt(form: str) -> None:
    cut = FORMS[form][: FORMS[form].index('"x y') + 3]
    assert read_calls(cut) is None
    assert scored("tool_call", FORMS[form], cut) == 0.0
    assert scored("needless_call", "It is warm.", cut) == 1.0


@pytest.mark.parametrize(
    "text", ["It is 5.", '{"temperature": 4}', "[1, 2]", '{"name": "Ann"}', "", "[x]", "{", "a {b} c"]
)
def test_what_is_no_call(text: str) -> None:
    assert read_calls(text) == []
    assert scored("needless_call", "It is warm.", text) == 0.0
    assert scored("tool_call", FORMS["hermes"], text) == 0.0


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ({"a": 1, "b": "x"}, 1.0),
        ({"b": "x", "a": 1.0}, 1.0),
        ({"a": True, "b": "x"}, 0.0),
        ({"a": "1", "b": "x"}, 0.0),
        ({"a": 1}, 0.0),
        ({"a": 1, "b": "x", "c": None}, 0.0),
        ({"a": 1, "b": "X"}, 0.0),
    ],
)
def test_arguments_are_compared_as_json(written: dict[str, object], right: float) -> None:
    import json

    def hermes(arguments: object, name: str = "f") -> str:
        return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"

    reference = hermes({"a": 1, "b": "x"})
    assert scored("tool_call", reference, hermes(written)) == right
    assert scored("tool_call", reference, hermes({"a": 1, "b": "x"}, "g")) == 0.0
    assert scored("tool_call", hermes([{"k": [1, {"z": 0}]}]), hermes([{"k": [1, {"z": False}]}])) == 0.0


def test_more_or_fewer_calls_or_another_order_are_wrong() -> None:
    one, two = FORMS["hermes"].split("</tool_call>")[:2]
    for written in (f"{one}</tool_call>", f"{FORMS['hermes']}{two}</tool_call>", f"{two}</tool_call>{one}</tool_call>"):
        assert scored("tool_call", FORMS["hermes"], written) == 0.0


def test_rows_are_told_apart_and_one_whose_form_is_not_known_is_left_out() -> None:
    """Where the reference cannot be read, a right answer could not be recognised: neither metric may count the row."""
    unknown = "CALL f WITH a=1"
    assert scored("tool_call", FORMS["hermes"], "no") == 0.0 and scored("needless_call", FORMS["hermes"], "no") is None
    assert scored("tool_call", "It is warm.", "no") is None and scored("needless_call", "It is warm.", "no") == 0.0
    for reference in (unknown, FORMS["llama"]):
        assert scored("tool_call", reference, reference, ("h",)) is None
        assert scored("needless_call", reference, reference, ("h",)) is None
    assert with_companions(["loss", "tool_call", "loss"]) == ["loss", "tool_call", "needless_call"]


def test_repetition_takes_no_time() -> None:
    """A model that repeats itself to the longest length."""
    began = time.process_time()
    for part in (
        "<arg_key></arg_value>",
        "<tool_call>f<arg_key>a",
        "to=functions.f ",
        "[TOOL_CALLS]f",
        "{",
        "<function=f>",
    ):
        read_calls(f"<tool_call>f {part * 500}")
        read_calls(part * 500)
    assert time.process_time() - began < 5
