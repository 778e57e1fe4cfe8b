"""Which of several domains a state belongs to, or none of them: by logistic regression with `none` as one more class.

    log-odds of domain d to none   =  (w_d - w_none) x + b_d - b_none
    the likeliest domain, if its log-odds reach what the wanted share of its own states reach, else none

That share is counted on states that the regression was not fitted to, by cross-validation. States beyond a few hundred
axes are fitted on the axes along which they vary most.

Source: Hastie, Tibshirani and Friedman (2009), The Elements of Statistical Learning, sections 4.4 and 7.10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lorafit.ops.logistic_regression import Fit, Rows, regress

_STRENGTH = 0.1
_FOLDS = 5
_MOST_AXES = 256
_LEAST_SCALE = 1e-6
LEAST_STATES = 2 * _FOLDS
"""Of a domain: with fewer nothing can be said of what a share of them reaches."""


@dataclass(frozen=True)
class DomainChooser:
    """A fitted choice.

    Attributes:
        names: The domains.
        weight: `[domains, width]`, of plain states, fp32.
        bias: `[domains]`.
        least: Log-odds that a state must reach, `[domains]`.
        known: Of each domain the log-odds of its own states, in order, each by a fit without it.
    """

    names: tuple[str, ...]
    weight: torch.Tensor
    bias: torch.Tensor
    least: torch.Tensor
    known: Mapping[str, torch.Tensor]

    def log_odds(self, states: torch.Tensor) -> torch.Tensor:
        """Of each domain to none, `[rows, domains]`."""
        return torch.addmm(self.bias, states, self.weight.t())

    def choose(self, states: torch.Tensor) -> list[str | None]:
        """The domain of each row; None: none of them."""
        best, which = self.log_odds(states).max(1)
        taken = (best >= self.least[which]).tolist()
        return [self.names[place] if is_taken else None for place, is_taken in zip(which.tolist(), taken, strict=True)]

    def with_share(self, share: float) -> DomainChooser:
        """The same, which takes that share of each domain's own states."""
        reached = (torch.quantile(self.known[name], 1 - share) for name in self.names)
        return DomainChooser(self.names, self.weight, self.bias, torch.stack([*reached]), self.known)


def fit_domains(states: Mapping[str, torch.Tensor], background: torch.Tensor, share: float) -> DomainChooser:
    """The choice that takes `share` of each domain's own states.

    Args:
        states: Of the domains, `[rows, width]`; at least `LEAST_STATES` rows each.
        background: States of no domain.
        share: 0 to 1.
    """
    names, parts = tuple(states), [*states.values(), background]
    rows = torch.cat(parts).double()
    mean, scale = rows.mean(0), rows.std(0).clamp(min=_LEAST_SCALE)
    standard = (rows - mean) / scale
    axes = torch.linalg.svd(standard, full_matrices=False).Vh[:_MOST_AXES].t()
    classes = torch.eye(len(parts), dtype=rows.dtype).repeat_interleave(torch.tensor([*map(len, parts)]), dim=0)
    seen = Rows(standard @ axes, classes)
    generator = torch.Generator().manual_seed(0)
    folds = torch.cat([torch.randperm(len(part), generator=generator) % _FOLDS for part in parts])
    known = torch.empty(len(rows), len(names), dtype=rows.dtype)
    for fold in range(_FOLDS):
        fit = _fit(Rows(*(part[folds != fold] for part in seen)))
        known[folds == fold] = seen.states[folds == fold] @ fit.weight.t() + fit.bias
    fit = _fit(seen)
    weight = fit.weight @ axes.t() / scale
    bias = fit.bias - weight @ mean
    own = {name: known[classes[:, number] > 0, number].float().sort().values for number, name in enumerate(names)}
    return DomainChooser(names, weight.float(), bias.float(), torch.empty(0), own).with_share(share)


def _fit(rows: Rows) -> Fit:
    """Log-odds of each class but the last to the last; classes weigh the same, however many rows they have."""
    weights = len(rows.classes) / (rows.classes.shape[1] * rows.classes.sum(0))
    fit = regress(Rows(rows.states, rows.classes * weights), _STRENGTH)
    return Fit(fit.weight[:-1] - fit.weight[-1:], fit.bias[:-1] - fit.bias[-1])


def drift_of(seen: Sequence[float], known: torch.Tensor) -> float:
    """One-sided Kolmogorov-Smirnov distance, D+: most by which more of `seen` than of `known` lie below a point.

    0: seen numbers are nowhere lower; 1: all are below all known ones. Those that are higher count nothing: states that
    a fit has seen get higher log-odds from it than from one without them. Of n numbers of the same distribution as m
    known ones, chance alone gives more than sqrt(ln(1/a) / 2 * (1/n + 1/m)) with a probability of about a.
    """
    sample = torch.tensor(seen).sort().values
    points = torch.cat([sample, known])
    shares = [torch.searchsorted(side, points, right=True) / len(side) for side in (sample, known)]
    return float((shares[0] - shares[1]).max())
