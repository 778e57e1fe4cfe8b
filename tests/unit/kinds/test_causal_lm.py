"""The causal-lm task drops what cannot be learnt and hands on the rest as it is."""

from __future__ import annotations

import pytest
import torch

from lorafit.contracts import Encoded, Sample
from lorafit.kinds.tasks import tasks

TASK = tasks.get("causal-lm")
SAMPLE = Sample(file="rows.jsonl", line=1, text="a b c")


@pytest.mark.parametrize(
    ("trained", "kept"), [([False, True, True], True), ([False, False, False], False), ([True, False, False], False)]
)
def test_a_row_without_a_token_that_can_be_predicted_is_dropped(trained, kept):
    encoded = Encoded([5, 6, 7], trained)
    assert TASK.encode(SAMPLE, lambda sample: encoded if sample is SAMPLE else None) is (encoded if kept else None)


def test_a_row_that_cannot_be_rendered_is_dropped():
    assert TASK.encode(SAMPLE, lambda sample: None) is None


def test_loss_and_answers_come_from_what_is_handed_in():
    model = torch.nn.Linear(1, 1)
    assert TASK.build_loss(model, torch.nn.Sequential)[0] is model
    assert TASK.predict([[1, 2], [3]], lambda prompts: [sum(prompt) for prompt in prompts]) == [3, 3]
    assert (TASK.auto_class, TASK.loss_unit) == ("AutoModelForCausalLM", "tokens")
