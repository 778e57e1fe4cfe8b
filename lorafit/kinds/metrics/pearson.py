"""Pearson's correlation of predicted numbers with the right ones: whether they lie on a line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.kinds.metrics import metrics
from lorafit.kinds.metrics._correlation import Correlation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@metrics.register("pearson")
class Pearson(Correlation):
    """Of the numbers themselves."""

    name = "pearson"
    settings = "of the numbers; 0 where all predicted ones are equal; of several numbers a row their mean"

    def scale(self, column: NDArray[np.float64]) -> NDArray[np.float64]:
        """As they are."""
        return column
