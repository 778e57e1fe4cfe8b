"""A distance of logits in units of their own spread."""

from __future__ import annotations

import pytest
import torch

from lorafit.contracts import JsonValue
from lorafit.kinds.tasks import tasks
from lorafit.ops.logits_distance import ROUNDING, logits_distance


def test_it_is_relative_and_sees_what_is_not_rounding() -> None:
    torch.manual_seed(0)
    logits = 7.0 * torch.randn(40, 300) + 100.0
    assert logits_distance(logits, logits) == 0.0
    assert logits_distance(logits, logits + 0.7 * torch.randn(40, 300)) == pytest.approx(0.1, rel=0.05)
    assert logits_distance(3 * logits, 3 * (logits + 0.7)) == pytest.approx(0.1, rel=0.05)  # shifted for all tokens
    assert logits_distance(logits, logits[torch.randperm(40)]) > 1.0
    assert logits_distance(logits, logits.bfloat16()) < ROUNDING[torch.bfloat16]
    assert not logits_distance(logits, logits * float("nan")) <= 1.0


def test_two_outputs_that_are_nearly_equal_are_judged_by_their_size() -> None:
    rewards = torch.tensor([[3.00, 3.01], [-2.00, -2.02]])
    rounded = rewards + torch.tensor([[0.02, -0.01], [0.01, 0.02]])
    assert logits_distance(rewards, rounded, "size") < 0.01 < logits_distance(rewards, rounded)
    assert logits_distance(rewards, rewards.flip(0), "size") > 1.0  # of other texts


def test_each_task_says_what_its_logits_are_measured_in() -> None:
    """Whatever has one output or two for each label would fail its proofs by rounding alone."""
    names: list[JsonValue] = ["a", "b", "c"]
    units = {name: tasks.make(name).logits_unit for name in tasks.names()}
    by_size = {"reward", "sequence-classification", "sequence-regression", "token-classification"}  # of two labels
    assert {name for name, unit in units.items() if unit == "size"} == by_size
    assert tasks.make("sequence-classification", labels=names).logits_unit == "spread"
    assert tasks.make("sequence-classification", labels=names, multi_label=True).logits_unit == "size"
    assert tasks.make("token-classification", labels=names).logits_unit == "spread"
