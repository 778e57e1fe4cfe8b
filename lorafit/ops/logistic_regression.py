"""Logistic regression over fixed states with an L2 term, its strength chosen on held-out rows.

    mean over rows of loss(X W' + b) + strength / 2 |W|^2           loss: of a softmax, or of a sigmoid a class

L-BFGS takes long where states are correlated, as those of a network are. So it works on V, in which the problem is
round, and which has the same minimum:

    X'X / n = Q diag(l) Q'          V = W Q diag(c)          c = sqrt(l / 4 + strength)

since the curvature of the loss is nowhere more than about a quarter of l. Strengths are tried from strong to weak, each
started where the one before ended, in fp32, until the held-out loss rises; the chosen one is fitted in fp64.

Source: Boehning (1992), "Multinomial logistic regression algorithm", Ann. Inst. Stat. Math. 44 (the bound); Friedman,
Hastie and Tibshirani (2010), "Regularization Paths for Generalized Linear Models", J. Stat. Softw. 33 (warm starts).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

STRENGTHS = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
_ITERATIONS = 200
_SMALLEST_GRADIENT, _SMALLEST_CHANGE = 1e-5, 1e-8


class Rows(NamedTuple):
    """Standardised states `[rows, width]`, and 0/1 for each class `[rows, classes]`."""

    states: torch.Tensor
    classes: torch.Tensor


class Fit(NamedTuple):
    """A solution: logits are `states @ weight.T + bias`."""

    weight: torch.Tensor
    bias: torch.Tensor


def row_losses(logits: torch.Tensor, classes: torch.Tensor, *, several: bool) -> torch.Tensor:
    """Of each row, `[rows]`, from logits and 0/1 for each class; of several classes the sum over them."""
    if several:
        return functional.binary_cross_entropy_with_logits(logits, classes, reduction="none").sum(-1)
    return functional.cross_entropy(logits, classes, reduction="none")


def choose_strength(tried: Rows, held_out: Rows, *, several: bool, advance: Callable[[int], None]) -> tuple[float, Fit]:
    """The strength with the least held-out loss, and its fit to the rows that were tried.

    Args:
        tried: Rows to fit.
        held_out: Rows to choose by.
        several: Whether a row may have several classes.
        advance: Told of each strength that is done, or will not be tried.
    """
    tried, held_out = (Rows(*(part.float() for part in rows)) for rows in (tried, held_out))
    found: list[tuple[float, float, Fit]] = []
    fit: Fit | None = None
    for strength in STRENGTHS:
        fit = regress(tried, strength, fit, several=several)
        logits = held_out.states @ fit.weight.T + fit.bias
        found.append((float(row_losses(logits, held_out.classes, several=several).mean()), strength, fit))
        advance(1)
        if len(found) > 1 and found[-1][0] > found[-2][0]:
            advance(len(STRENGTHS) - len(found))
            break
    _, best, fit = min(found, key=lambda entry: entry[0])
    return best, fit


def regress(rows: Rows, strength: float, start: Fit | None = None, *, several: bool = False) -> Fit:
    """The minimum, in the dtype of the states, from zeros or from another fit."""
    states, classes = rows
    count, width = states.shape
    shares, axes = torch.linalg.eigh(states.T @ states / count)
    scales = (shares.clamp(min=0) / 4 + strength).sqrt()
    turned = states @ (axes / scales)
    begin = start or Fit(states.new_zeros((classes.shape[1], width)), states.new_zeros(classes.shape[1]))
    weight = (begin.weight.to(states) @ axes * scales).requires_grad_()
    bias = begin.bias.to(states, copy=True).requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        tolerance_grad=_SMALLEST_GRADIENT,
        tolerance_change=_SMALLEST_CHANGE,
        line_search_fn="strong_wolfe",
    )

    def measure() -> torch.Tensor:
        loss: torch.Tensor = row_losses(turned @ weight.T + bias, classes, several=several).mean()
        loss = loss + strength / 2 * (weight / scales).square().sum()
        weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
        value: torch.Tensor = loss.detach()
        return value

    with torch.enable_grad():
        solver.step(measure)  # type: ignore[no-untyped-call]
    return Fit((weight.detach() / scales) @ axes.T, bias.detach())
