"""What is told of answers."""

from __future__ import annotations

import pytest

from lorafit.serving.metrics import declines


@pytest.mark.parametrize(
    "text", ["I'm sorry, but no.", " I cannot say.", "I can’t.", "As an AI model, I ...", "SORRY, no"]
)
def test_an_answer_that_declines(text: str) -> None:
    assert declines(text)


@pytest.mark.parametrize("text", ["", "We are sorry that it broke.", "No. I cannot.", "The shop opens at nine."])
def test_an_answer_that_does_not(text: str) -> None:
    assert not declines(text)
