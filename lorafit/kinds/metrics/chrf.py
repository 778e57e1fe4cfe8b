"""chrF over the corpus of answers, 0 to 100, by sacrebleu with its defaults (character 6-grams, beta 2).

Source: Popović (2015), "chrF: character n-gram F-score for automatic MT evaluation".
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from lorafit.kinds.metrics import CorpusScore, metrics


@metrics.register("chrf")
class Chrf(CorpusScore):
    """Corpus chrF2. A row adds, for 1- to 6-grams, the counts in answer and reference, and matches."""

    name = "chrf"

    @cached_property
    def scorer(self) -> Any:
        """With its defaults."""
        from sacrebleu.metrics import CHRF

        return CHRF()
