"""What is told of answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorafit.answering.ticket import Figures
from lorafit.serving.metrics import _REFUSALS, Metrics, declines


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but no.",
        " I cannot say.",
        "I can’t.",
        "As an AI model, I ...",
        "SORRY, no",
        "<think>easy</think>\n\nI can't.",
    ],
)
def test_an_answer_that_declines(text: str) -> None:
    assert declines(text)


@pytest.mark.parametrize(
    "text", ["", "We are sorry that it broke.", "No. I cannot.", "The shop opens at nine.", "<think>I cannot ..."]
)
def test_an_answer_that_does_not(text: str) -> None:
    assert not declines(text)


def test_the_page_says_what_a_refusal_is() -> None:
    page = Path("docs/serve.md").read_text(encoding="utf-8").lower()
    assert all(f"`{phrase}`" in page for phrase in _REFUSALS)


def test_an_adapter_takes_its_figures_with_it() -> None:
    """Each is some kilobytes, and names may come and go by the thousand."""
    engine: Any = SimpleNamespace(adapters=["a", "b"])
    engine.figures = lambda: Figures(0, 0, 0, 0, {None: 1, "a": 2}, {"a": 3}, {("a", "error"): 1})
    metrics = Metrics(engine, "base")

    def answer(adapter: str | None) -> None:
        metrics.first_token(adapter, 0.1)
        metrics.end(adapter, 0.2, 5, 7, "I cannot say.")

    for adapter in (None, "a", "b"):
        answer(adapter)
    told = metrics.text().decode()
    assert 'lorafit:request_refusals_total{adapter="a",model_name="base"} 1.0' in told
    assert 'lorafit:request_prompt_tokens_sum{adapter="b",model_name="base"} 5.0' in told
    assert 'lorafit:request_generation_tokens_bucket{adapter="b",le="16.0",model_name="base"} 1.0' in told
    assert 'lorafit:request_success_total{adapter="a",finished_reason="error",model_name="base"} 1.0' in told
    engine.adapters = ["b"]
    metrics.forget("a")
    answer("a")  # its last request, which is told only now
    told = metrics.text().decode()
    assert 'adapter="a"' not in told
    assert 'lorafit:request_refusals_total{adapter="b"' in told and 'adapter=""' in told
