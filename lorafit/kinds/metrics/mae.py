"""Absolute error of predicted numbers: its mean over rows and over numbers of a row."""

from __future__ import annotations

from lorafit.kinds.metrics import ScoreMean, metrics


@metrics.register("mae")
class AbsoluteError(ScoreMean):
    """In the numbers' own unit."""

    name = "mae"
    reads = ("absolute_error", "weight")
    condition = "a row with a number"
    settings = "mean over rows, and over the numbers of a row"
