"""What a row's answer calls reaches the metric: reference and answer of families that write tool calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from render_families import WEATHER, assistant, call, tokenizer_of, user

from lorafit.contracts import Sample
from lorafit.data.sample_renderer import Renderer
from lorafit.kinds.metrics import RowScore
from lorafit.kinds.metrics.tool_call import NeedlessCall, ToolCall, read_calls
from lorafit.recipe.schema import DataSection


def row_of(family: str, turn: dict[str, Any]) -> RowScore:
    """The row's reference, answered by itself."""
    data = DataSection.model_validate({"train": [{"path": "rows.jsonl"}]})
    sample = Sample("rows.jsonl", 1, messages=(user("How warm is it?"), turn), tools=(WEATHER,))
    row = Renderer(tokenizer_of(family), data, None).generation_row(sample)
    assert row is not None
    return RowScore(0.0, 0, 0, row.reference, row.reference, (), written=row.reference, calls=row.calls)


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
