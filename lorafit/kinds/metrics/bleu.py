"""BLEU over the corpus of answers, 0 to 100, by sacrebleu with its defaults (tokenizer 13a, exponential smoothing).

Source: Papineni et al. (2002), "BLEU: a Method for Automatic Evaluation of Machine Translation"; Post (2018), "A Call
for Clarity in Reporting BLEU Scores".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from lorafit.kinds.metrics import RowScore, metrics


@cache
def _scorer() -> Any:
    from sacrebleu.metrics import BLEU

    # force: answers that end in " ." are no sign of tokenised text here
    return BLEU(force=True)


@metrics.register("bleu")
class Bleu:
    """Corpus BLEU: n-gram counts are summed over rows before precisions are taken."""

    needs: Literal["loss", "answers"] = "answers"
    better: Literal["lower", "higher"] = "higher"
    during_training = False
    percent = False
    condition = "a row with a reference answer"

    def usable(self, row: RowScore) -> bool:
        """Rows that hold a reference and got an answer."""
        return row.answer is not None and bool(row.reference.strip())

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """Length of the answer and of the reference, then matches and totals of 1- to 4-grams."""
        answers, references = [row.answer or "" for row in rows], [row.reference for row in rows]
        return [list(map(float, sums)) for sums in _scorer()._extract_corpus_statistics(answers, [references])]

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """BLEU from summed counts."""
        return {"bleu": float(_scorer()._compute_score_from_stats([int(x) for x in sums]).score)}

    def signature(self) -> str:
        """sacrebleu's own signature."""
        _scorer().num_refs = 1
        return str(_scorer().get_signature())
