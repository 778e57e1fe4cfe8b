"""BLEU and chrF over the corpus of answers, 0 to 100, by sacrebleu with its defaults.

Those are tokenizer 13a and exponential smoothing, character 6-grams and beta 2. 13a parts words at blanks, so that a
Chinese sentence would be one word, right or wrong as a whole. Letters of scripts that write no blanks are set apart
before, as sacrebleu's tokenizer `zh` does with Chinese ones.

Source: Papineni et al. (2002), "BLEU: a Method for Automatic Evaluation of Machine Translation"; Post (2018), "A Call
for Clarity in Reporting BLEU Scores"; Popović (2015), "chrF: character n-gram F-score for automatic MT evaluation".
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from lorafit.kinds.metrics import UNSPACED, Metric, RowScore, metrics

_SET_APART = re.compile(f"[{UNSPACED}\u3001-\u303f\uff01-\uff9f]")  # and their punctuation


class CorpusScore(Metric):
    """A corpus metric of sacrebleu: its statistics of each answer are what is summed over rows."""

    @cached_property
    @abstractmethod
    def scorer(self) -> Any:
        """sacrebleu's metric, made once."""

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """sacrebleu's counts of n-grams and lengths."""
        answers, references = [row.answer or "" for row in rows], [row.reference for row in rows]
        return [list(map(float, sums)) for sums in self.scorer._extract_corpus_statistics(answers, [references])]

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The score from summed counts."""
        return {self.name: float(self.scorer._compute_score_from_stats([int(x) for x in sums]).score)}

    def signature(self) -> str:
        """sacrebleu's own signature."""
        self.scorer.num_refs = 1
        return str(self.scorer.get_signature())


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


@metrics.register("chrf")
class Chrf(CorpusScore):
    """Corpus chrF2. A row adds, for 1- to 6-grams, the counts in answer and reference, and matches."""

    name = "chrf"

    @cached_property
    def scorer(self) -> Any:
        """With its defaults."""
        from sacrebleu.metrics import CHRF

        return CHRF()
