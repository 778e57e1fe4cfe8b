"""ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum, F-measure with Porter stemmer, 0 to 1, by rouge_score; mean over rows.

rouge_score's own tokenizer reads a-z and 0-9 alone: it sees two pieces of "Größe", and of a Chinese sentence its
numbers. It is given the words of any script instead; text in ASCII keeps the tokens, and so the scores, of its own.

Source: Lin (2004), "ROUGE: A Package for Automatic Evaluation of Summaries".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

from lorafit.kinds.metrics import UNSPACED, Metric, RowScore, metrics

KINDS = ("rougeL", "rouge1", "rouge2", "rougeLsum")
_ASCII_WORD = re.compile(r"[a-z0-9]+")
_UNSPACED = re.compile(f"[{UNSPACED}]")
_ZERO_WIDTH_SPACE = "\u200b"


def split_words(text: str) -> list[str]:
    """Lower-case words: letters and digits of any script with their accents and vowel signs; all else parts them.

    Each letter of a script that writes no blanks between words is a word. Compatibility forms count as the plain ones.
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    words: list[str] = []
    in_word = behind_letter = False
    for letter in unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()):
        category = unicodedata.category(letter)
        if category == "Cf" and letter != _ZERO_WIDTH_SPACE:  # joiners and soft hyphens stand inside words
            continue
        if category[0] not in "LMN":
            in_word = behind_letter = False
            continue
        is_mark = category[0] == "M"
        stands_alone = not is_mark and _UNSPACED.match(letter) is not None
        if (is_mark and behind_letter) or (in_word and not stands_alone):
            words[-1] += letter
        else:
            words.append(letter)
            in_word = not stands_alone
        behind_letter = True
    return words


class _Words:
    """What rouge_score takes for a tokenizer. Words of a-z and 0-9 go through its own, which stems them."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._own = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Tokens in order."""
        return [
            token for word in split_words(text) for token in (self._own.tokenize(word) if word.isascii() else [word])
        ]


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(KINDS), tokenizer=_Words())


@metrics.register("rouge")
class Rouge(Metric):
    """Overlap of words, word pairs and longest common subsequences. ROUGE-Lsum takes each line as a sentence."""

    name = KINDS[0]
    condition = "a row whose reference holds letters or digits"

    def usable(self, row: RowScore) -> bool:
        """Rows that got an answer and whose reference holds a word."""
        return row.answer is not None and bool(split_words(row.reference))

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

        return (
            f"rouge_score {version('rouge_score')}, F-measure, Porter stemmer, mean over rows; words of any script, "
            "letters where a script writes no blanks"
        )
