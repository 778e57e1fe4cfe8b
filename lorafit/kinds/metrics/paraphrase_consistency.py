"""Whether the same question in other words, which the rows hold in `paraphrases`, gets the same answer.

    row        "When are you open?"       -> "From 9 to 5."        the row's own answer
    paraphrase "What are your hours?"     -> "From 9 to 5."        likeness 1, the same
    paraphrase "Until when can I come?"   -> "We close at 5 pm."   likeness by embeddings or letters, not the same

Source: Elazar et al. (2021), "Measuring and Improving Consistency in Pretrained Language Models" (consistency: the
share of paraphrases with the same prediction).
"""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.kinds.metrics import Question, RowScore, metrics
from lorafit.kinds.metrics._consistency import Consistency


@metrics.register("paraphrase_consistency")
class ParaphraseConsistency(Consistency):
    """Over the paraphrases that rows name."""

    name = "paraphrase_consistency"
    same = "paraphrase_same"
    beside = (same,)
    condition = "a row that names paraphrases other than its question"

    def usable(self, row: RowScore) -> bool:
        """Rows that name other words, end in words of the user and got an answer."""
        return row.answer is not None and bool(_others(row) and row.prompt)

    def questions(self, row: RowScore, draws: int) -> Sequence[Question]:
        """Each paraphrase."""
        return [Question("paraphrase", words) for words in _others(row)]


def _others(row: RowScore) -> list[str]:
    """Its paraphrases but those that are the question itself, which would count as consistent."""
    return [words for words in row.paraphrases if words.split() != row.prompt.split()]
