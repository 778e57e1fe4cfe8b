"""chrF over the corpus of answers, 0 to 100, by sacrebleu with its defaults (character 6-grams, beta 2).

Source: Popović (2015), "chrF: character n-gram F-score for automatic MT evaluation".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from lorafit.kinds.metrics import RowScore, metrics


@cache
def _scorer() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


@metrics.register("chrf")
class Chrf:
    """Corpus chrF2: character n-gram counts are summed over rows before the F-score is taken."""

    needs: Literal["loss", "answers"] = "answers"
    better: Literal["lower", "higher"] = "higher"
    during_training = False
    percent = False
    condition = "a row with a reference answer"

    def usable(self, row: RowScore) -> bool:
        """Rows that hold a reference and got an answer."""
        return row.answer is not None and bool(row.reference.strip())

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """For 1- to 6-grams: count in the answer, in the reference, and matches."""
        answers, references = [row.answer or "" for row in rows], [row.reference for row in rows]
        return [list(map(float, sums)) for sums in _scorer()._extract_corpus_statistics(answers, [references])]

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """chrF from summed counts."""
        return {"chrf": float(_scorer()._compute_score_from_stats(list(sums)).score)}

    def signature(self) -> str:
        """sacrebleu's own signature."""
        _scorer().num_refs = 1
        return str(_scorer().get_signature())
