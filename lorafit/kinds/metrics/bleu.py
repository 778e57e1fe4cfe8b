"""BLEU over the corpus of answers, 0 to 100, by sacrebleu with its defaults (tokenizer 13a, exponential smoothing).

13a parts words at blanks, so that a Chinese sentence would be one word, right or wrong as a whole. Letters of scripts
that write no blanks are set apart before, as sacrebleu's tokenizer `zh` does with Chinese ones.

Source: Papineni et al. (2002), "BLEU: a Method for Automatic Evaluation of Machine Translation"; Post (2018), "A Call
for Clarity in Reporting BLEU Scores".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from lorafit.kinds.metrics import UNSPACED, CorpusScore, RowScore, metrics

_SET_APART = re.compile(f"[{UNSPACED}\u3001-\u303f\uff01-\uff9f]")  # and their punctuation


@metrics.register("bleu")
class Bleu(CorpusScore):
    """Corpus BLEU. A row adds the lengths of answer and reference, then matches and totals of 1- to 4-grams."""

    name = "bleu"

    @cached_property
    def scorer(self) -> Any:
        """With its defaults."""
        from sacrebleu.metrics import BLEU

        # force: answers that end in " ." are no sign of tokenised text here
        return BLEU(force=True)

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """sacrebleu's counts, of texts in which unspaced letters stand apart."""
        return super().row_sums(
            [replace(row, answer=_set_apart(row.answer or ""), reference=_set_apart(row.reference)) for row in rows]
        )

    def signature(self) -> str:
        """sacrebleu's own, and what was done before."""
        return f"{super().signature()}; letters of scripts without blanks set apart"


def _set_apart(text: str) -> str:
    return _SET_APART.sub(r" \g<0> ", text)
