"""chrF over the corpus of answers, 0 to 100, by sacrebleu with its defaults (character 6-grams, beta 2).

Source: Popović (2015), "chrF: character n-gram F-score for automatic MT evaluation".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from lorafit.kinds.metrics import CorpusScore, metrics


@cache
def _scorer() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


@metrics.register("chrf")
class Chrf(CorpusScore):
    """Corpus chrF2. A row adds, for 1- to 6-grams, the counts in answer and reference, and matches."""

    scorer = staticmethod(_scorer)

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """chrF from summed counts."""
        return {"chrf": float(_scorer()._compute_score_from_stats(list(sums)).score)}
