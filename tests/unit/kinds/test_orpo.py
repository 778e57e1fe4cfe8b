"""ORPO against the paper's equations over transformers' log-probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lorafit.data.batch import cut_step
from lorafit.kinds.tasks import tasks
from tests.support.pairs import PAD, SIDES, make_examples, plain_log_probs
from tests.unit.evaluation.conftest import add_adapter, build_llama


def log_odds(mean: torch.Tensor) -> torch.Tensor:
    """Equation 4, from equation 3's p = exp(mean)."""
    return torch.log(mean.exp() / (1 - mean.exp()))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("weight", [0.1, 3.0])
def test_loss_and_gradient_are_those_of_the_paper(weight: float, exact: bool) -> None:
    task, examples = tasks.make("orpo", odds_weight=weight), make_examples()
    tuned = add_adapter(build_llama())
    objective, trained = task.build_objective(tuned, exact=exact), [p for p in tuned.parameters() if p.requires_grad]
    loss = objective(task.collate([[one] for one in examples], PAD))
    lengths = [torch.tensor([float(sum(one[f"{side}_trained"])) for side in SIDES]) for one in examples]
    means = torch.stack([plain_log_probs(tuned, one) / count for one, count in zip(examples, lengths, strict=True)])
    odds = log_odds(means.double())
    ratios = odds[:, 0] - odds[:, 1]
    wanted = -means[:, 0] - weight * torch.log(torch.sigmoid(ratios))  # equations 6 and 7
    assert loss.weight == len(examples)
    torch.testing.assert_close(loss.loss_sum, wanted.sum().float(), rtol=2e-5, atol=1e-5)
    gradients = torch.autograd.grad(loss.loss_sum, trained)
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted.sum(), trained), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5 * float(theirs.abs().max()))
    scores = objective.score(task.collate([[one] for one in examples], PAD))
    assert np.allclose(scores["margin"], ratios.detach().numpy(), rtol=1e-4, atol=1e-4)
    assert scores["preferred"].tolist() == (ratios > 0).tolist()


def test_a_step_costs_the_same_however_it_is_cut() -> None:
    task, examples = tasks.make("orpo"), make_examples(9)
    objective = task.build_objective(add_adapter(build_llama()))
    lengths = [task.row_tokens(max(len(one[f"{side}_tokens"]) for side in SIDES)) for one in examples]
    sums = []
    for budget in (1, 90, 1000):
        cut = cut_step(range(len(examples)), lengths, budget)
        losses = [objective(task.collate([[examples[row]] for row in part], PAD)).loss_sum.item() for part in cut]
        sums.append(sum(losses))
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-6)


def test_an_answer_that_is_certain_keeps_finite_losses_and_gradients() -> None:
    """Where p rounds to 1 its odds are without bound in the paper."""
    task = tasks.make("orpo")
    batch: Any = task.collate([[one] for one in make_examples(2)], PAD)
    log_probs = torch.tensor([[0.0, -4.0], [-1e-18, 0.0]], dtype=torch.float64, requires_grad=True)
    losses, margins = task.compare(log_probs, batch)
    (gradient,) = torch.autograd.grad(losses.sum(), log_probs)
    assert all(bool(torch.isfinite(values).all()) for values in (losses, margins, gradient))
