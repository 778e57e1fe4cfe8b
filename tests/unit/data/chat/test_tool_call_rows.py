"""What a row's answer calls reaches the metric: reference and answer of families that write tool calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lorafit.contracts import GenerationRow, Sample
from lorafit.data.sample_renderer import Renderer
from lorafit.kinds.metrics import RowScore
from lorafit.kinds.metrics.tool_call import NeedlessCall, ToolCall, read_calls
from lorafit.recipe.schema import DataSection
from tests.support.chat_families import WEATHER, assistant, call, tokenizer_of, tool, user


def row_of(family: str, turn: dict[str, Any]) -> RowScore:
    """The row's reference, answered by itself."""
    data = DataSection.model_validate({"train": [{"path": "rows.jsonl"}]})
    sample = Sample("rows.jsonl", 1, messages=(user("How warm is it?"), turn), tools=(WEATHER,))
    (row,) = Renderer(tokenizer_of(family), data, None).generation_rows(sample, with_calls=True)
    return RowScore({}, row.reference, row.reference, (), written=row.reference, calls=row.calls)


@pytest.mark.parametrize("family", ["mistral", "qwen"])
def test_calls_of_a_row_are_read_from_what_its_template_writes(family: str) -> None:
    asked = assistant("", tool_calls=[call("weather", city="Paris", days=2), call("weather", city="Rome")])
    row = row_of(family, asked)
    assert row.calls == ("weather", "weather")
    assert read_calls(row.reference) == [("weather", {"city": "Paris", "days": 2}), ("weather", {"city": "Rome"})]
    assert ToolCall().usable(row) and ToolCall().row_sums([row]) == [[1.0, 1.0]]
    wrong = replace(row, written=row.reference.replace("Rome", "Oslo"))
    assert ToolCall().row_sums([wrong]) == [[0.0, 1.0]]
    assert not NeedlessCall().usable(row)


def test_a_row_without_calls_is_for_the_other_metric() -> None:
    row = row_of("qwen", assistant("It is warm."))
    assert row.calls == ()
    assert NeedlessCall().usable(row) and not ToolCall().usable(row)


@pytest.mark.parametrize("family", ["mistral", "qwen"])
def test_a_chat_that_goes_on_behind_its_calls_is_asked_at_the_last_of_them_too(family: str) -> None:
    """The prompt of the call is what the row that ends there has; the last answer is asked as without calls."""
    data = DataSection.model_validate({"train": [{"path": "rows.jsonl"}]})
    renderer = Renderer(tokenizer_of(family), data, None)

    def ask(*turns: dict[str, Any], with_calls: bool = True) -> list[GenerationRow]:
        sample = Sample("rows.jsonl", 1, messages=turns, tools=(WEATHER,), must_contain=("warm",))
        return renderer.generation_rows(sample, with_calls=with_calls)

    first = (user("Paris?"), assistant("", tool_calls=[call("weather", city="Paris")]), tool("20"), assistant("Warm."))
    second = (user("Rome?"), assistant("", tool_calls=[call("weather", city="Rome")]))
    whole = (*first, *second, tool("25"), assistant("It is warm too."))
    inner, last = ask(*whole)
    (only,) = ask(*first, *second)
    assert inner == replace(only, must_contain=(), is_inner=True)
    assert ask(*whole, with_calls=False) == [last]
    assert last.reference.endswith("It is warm too.") and (last.calls, last.is_inner) == ((), False)
    assert read_calls(inner.reference) == [("weather", {"city": "Rome"})] and "Rome?" in inner.prompt_text
    untrained = {**second[1], "weight": 0}
    (inner, _) = ask(*first, second[0], untrained, tool("25"), assistant("It is warm too."))
    assert read_calls(inner.reference) == [("weather", {"city": "Paris"})]
