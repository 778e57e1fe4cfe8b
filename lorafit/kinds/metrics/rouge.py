"""ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum, F-measure with Porter stemmer, 0 to 1, by rouge_score; mean over rows.

rouge_score reads only a-z and 0-9, so a row whose reference holds none of them cannot be scored and is counted instead.

Source: Lin (2004), "ROUGE: A Package for Automatic Evaluation of Summaries".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from lorafit.kinds.metrics import RowScore, metrics

KINDS = ("rougeL", "rouge1", "rouge2", "rougeLsum")
_READABLE = re.compile(r"[a-z0-9]", re.IGNORECASE | re.ASCII)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(KINDS), use_stemmer=True)


@metrics.register("rouge")
class Rouge:
    """Overlap of words, word pairs and longest common subsequences. ROUGE-Lsum takes each line as a sentence."""

    needs: Literal["loss", "answers"] = "answers"
    better: Literal["lower", "higher"] = "higher"
    during_training = False
    percent = False
    condition = "a row whose reference holds letters a-z or digits"

    def usable(self, row: RowScore) -> bool:
        """Rows that got an answer and whose reference rouge_score can read."""
        return row.answer is not None and _READABLE.search(row.reference) is not None

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """The four F-measures of the row, and 1."""
        scores = [_scorer().score(row.reference, row.answer or "") for row in rows]
        return [[*(float(score[kind].fmeasure) for kind in KINDS), 1.0] for score in scores]

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The four means."""
        return {kind: total / sums[-1] for kind, total in zip(KINDS, sums, strict=False)}

    def signature(self) -> str:
        """Program and settings."""
        from importlib.metadata import version

        return f"rouge_score {version('rouge_score')}, F-measure, Porter stemmer, mean over rows"
