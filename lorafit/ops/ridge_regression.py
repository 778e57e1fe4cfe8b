"""Ridge regression over fixed states: least squares with an L2 term, its strength chosen on held-out rows.

    mean over rows of |X W' + b - Y|^2 + strength |W|^2        states and numbers standardised, so that b is 0
    X'X / n = Q diag(l) Q'        W = (Y'X / n) Q diag(1 / (l + strength)) Q'

One decomposition serves all strengths.

Source: Hoerl and Kennard (1970), "Ridge Regression: Biased Estimation for Nonorthogonal Problems", Technometrics 12.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STRENGTHS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)
_HELD_OUT_EVERY = 10
_LEAST_SCALE = 1e-8


def fit_ridge(
    states: torch.Tensor, right: torch.Tensor, chosen_on: tuple[torch.Tensor, torch.Tensor] | None
) -> Mapping[str, NDArray[np.float64]]:
    """`weight` [outputs, width] and `bias` [outputs] of plain states: fitted to all rows with the chosen strength.

    Args:
        states: Of the training rows, fp64 [rows, width].
        right: The numbers that are wanted, fp64 [rows, outputs].
        chosen_on: The same of held-out rows; every tenth training row where None.
    """
    mean, scale = states.mean(0), states.std(0, correction=0).clamp(min=_LEAST_SCALE)
    centre, unit = right.mean(0), right.std(0, correction=0).clamp(min=_LEAST_SCALE)

    def standardise(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x - mean) / scale, (y - centre) / unit

    rows = standardise(states, right)
    if chosen_on is not None:
        tried, choosing = rows, standardise(*chosen_on)
    else:
        held_out = torch.arange(len(right)) % _HELD_OUT_EVERY == 0
        tried, choosing = ((rows[0][flags], rows[1][flags]) for flags in (~held_out, held_out))
    weights = _solve(*tried)
    errors = [float((choosing[0] @ weight.T - choosing[1]).square().mean()) for weight in weights]
    best = min(range(len(STRENGTHS)), key=errors.__getitem__)
    weight = _solve(*rows)[best] * unit[:, None] / scale
    values = {
        "weight": weight,
        "bias": centre - weight @ mean,
        "strength": torch.tensor([STRENGTHS[best]], dtype=torch.float64),
    }
    return {name: value.double().cpu().numpy() for name, value in values.items()}


def _solve(states: torch.Tensor, right: torch.Tensor) -> list[torch.Tensor]:
    """The weights [outputs, width] of each strength."""
    shares, axes = torch.linalg.eigh(states.T @ states / len(states))
    turned = right.T @ states @ axes / len(states)
    return [turned / (shares.clamp(min=0) + strength) @ axes.T for strength in STRENGTHS]
