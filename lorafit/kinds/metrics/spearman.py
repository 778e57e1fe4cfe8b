"""Spearman's correlation of predicted numbers with the right ones: whether they come in the same order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.kinds.metrics import metrics
from lorafit.kinds.metrics._correlation import Correlation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@metrics.register("spearman")
class Spearman(Correlation):
    """Pearson's of ranks. A bootstrap draws rows with the ranks that they have among all rows."""

    name = "spearman"
    settings = "of ranks among all rows, equal numbers sharing the mean of theirs; of several numbers a row their mean"

    def scale(self, column: NDArray[np.float64]) -> NDArray[np.float64]:
        """Ranks from 1."""
        import numpy as np

        _, place, counts = np.unique(column, return_inverse=True, return_counts=True)
        behind = np.cumsum(counts)
        ranks: NDArray[np.float64] = (behind - (counts - 1) / 2)[place]
        return ranks
