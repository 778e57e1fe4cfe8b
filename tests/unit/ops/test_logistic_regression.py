"""The logistic regression is the minimum of its loss, whatever path led there."""

from __future__ import annotations

import pytest
import torch

from lorafit.ops.logistic_regression import STRENGTHS, Fit, Rows, choose_strength, regress, row_losses


def correlated_rows(count: int, *, several: bool, seed: int = 0) -> Rows:
    """States that lie nearly in few directions, as those of a network do, with noisy labels."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    mixed = few @ torch.randn(4, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    states = mixed + 0.01 * torch.randn(count, 24, generator=generator, dtype=torch.float64)
    states = (states - states.mean(0)) / states.std(0, correction=0)
    scores = few[:, :3] + torch.randn(count, 3, generator=generator, dtype=torch.float64)
    classes = scores > 0.5 if several else torch.nn.functional.one_hot(scores.argmax(-1), 3)
    return Rows(states, classes.double())


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("strength", [1.0, 1e-3])
def test_the_gradient_is_gone_in_the_loss_as_it_is_defined(strength: float, several: bool) -> None:
    rows = correlated_rows(300, several=several)
    found = regress(rows, strength, several=several)
    weight, bias = (value.clone().requires_grad_() for value in found)
    loss = row_losses(rows.states @ weight.T + bias, rows.classes, several=several).mean()
    loss = loss + strength / 2 * weight.square().sum()
    gradients = torch.autograd.grad(loss, (weight, bias))
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-4
    start = Fit(torch.randn_like(found.weight).float(), torch.randn_like(found.bias).float())
    again = regress(rows, strength, start, several=several)
    logits, others = (rows.states @ fit.weight.T + fit.bias for fit in (found, again))
    apart = logits - others
    apart = apart if several else apart - apart.mean(-1, keepdim=True)  # a softmax does not see a common shift
    assert again.weight.dtype is torch.float64 and float(apart.abs().max()) < 0.02


def test_the_strength_is_the_one_with_the_least_held_out_loss() -> None:
    tried, held_out = (correlated_rows(count, several=False, seed=seed) for count, seed in ((60, 0), (400, 5)))
    done: list[int] = []
    best, fit = choose_strength(tried, held_out, several=False, advance=done.append)
    assert sum(done) == len(STRENGTHS), "the bar does not end"

    def loss(strength: float) -> float:
        each = regress(tried, strength)
        return float(row_losses(held_out.states @ each.weight.T + each.bias, held_out.classes, several=False).mean())

    losses = {strength: loss(strength) for strength in STRENGTHS}
    assert best == min(losses, key=losses.__getitem__) and fit.weight.shape == (3, 24)
    assert 1.0 != best != STRENGTHS[-1], "the rows do not tell strengths apart"
