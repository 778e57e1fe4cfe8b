"""BLEU over the corpus of answers, 0 to 100, by sacrebleu with its defaults (tokenizer 13a, exponential smoothing).

Source: Papineni et al. (2002), "BLEU: a Method for Automatic Evaluation of Machine Translation"; Post (2018), "A Call
for Clarity in Reporting BLEU Scores".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from lorafit.kinds.metrics import CorpusScore, metrics


@cache
def _scorer() -> Any:
    from sacrebleu.metrics import BLEU

    # force: answers that end in " ." are no sign of tokenised text here
    return BLEU(force=True)


@metrics.register("bleu")
class Bleu(CorpusScore):
    """Corpus BLEU. A row adds the lengths of answer and reference, then matches and totals of 1- to 4-grams."""

    scorer = staticmethod(_scorer)

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """BLEU from summed counts."""
        return {"bleu": float(_scorer()._compute_score_from_stats([int(x) for x in sums]).score)}
