"""How far answers are from the references in style: a Delta over features that can be counted in any language.

    z       (feature of an answer - mean over the references) / their standard deviation, for each of twelve features
    style_distance   mean of |z| over features, then over rows: an answer's own distance, natural variety included
    style_delta      mean over features of |mean of z over rows|: how far the answers as a whole lean to one side

The delta has no interval: rows that lean nowhere together lean to some side wherever only some of them are drawn.

References that are taken for answers have a distance of about 0.8 (the mean |z| of a normal feature), which the table
gives, and a delta of 0. A feature in which all references are alike is divided by its least spread, so that a list
where no reference has one counts, and a rounding does not. A right answer in another tone is far, a wrong one in the
same tone near: style says nothing of content.

Source: Burrows (2002), "'Delta': a Measure of Stylistic Difference and a Guide to Likely Authorship", Literary and
Linguistic Computing 17(3), with these features in the place of the frequencies of common words.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lorafit.contracts import ReportTable
from lorafit.kinds.metrics import UNSPACED, Metric, RowScore, metrics

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+(?:['’-][^\W_{UNSPACED}]+)*")
_ENDS = ".!?…。！？؟।"
_SENTENCE = re.compile(rf"[^{_ENDS}\n]*[^\s{_ENDS}][^{_ENDS}\n]*")
_MARKUP = re.compile(r"\s*(?:[-*+•]\s|\d+[.)]\s|#{1,6}\s|>\s|```|\|)|.*(?:\*\*|__)\S")


class _Text(NamedTuple):
    """What features are counted of.

    Attributes:
        letters: Its letters.
        shown: Its characters, blanks apart.
        sentences: Number of its sentences, at least 1.
    """

    whole: str
    words: list[str]
    letters: list[str]
    shown: list[str]
    lines: list[str]
    sentences: int

    @classmethod
    def of(cls, text: str) -> _Text:
        return cls(
            text,
            _WORD.findall(text),
            [letter for letter in text if letter.isalpha()],
            [letter for letter in text if not letter.isspace()],
            [line for line in text.splitlines() if line.strip()],
            max(1, len(_SENTENCE.findall(text))),
        )


def _share(items: Sequence[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, items)) / len(items) if items else 0.0


def _is_latin(letter: str) -> bool:
    return letter.isascii() or unicodedata.name(letter, "").startswith("LATIN")


FEATURES: Mapping[str, tuple[Callable[[_Text], float], float]] = {
    "words (log)": (lambda text: math.log1p(len(text.words)), 0.1),
    "words a sentence (log)": (lambda text: math.log1p(len(text.words) / text.sentences), 0.1),
    "letters a word": (lambda text: sum(map(len, text.words)) / max(1, len(text.words)), 0.2),
    "lines (log)": (lambda text: math.log1p(len(text.lines)), 0.1),
    "lines with lists or markup": (lambda text: _share(text.lines, lambda line: bool(_MARKUP.match(line))), 0.05),
    "capitals": (lambda text: _share(text.letters, str.isupper), 0.01),
    "letters of Latin script": (lambda text: _share(text.letters, _is_latin), 0.02),
    "digits": (lambda text: _share(text.shown, str.isdigit), 0.01),
    "punctuation": (lambda text: _share(text.shown, lambda one: unicodedata.category(one)[0] == "P"), 0.01),
    "symbols and emoji": (lambda text: _share(text.shown, lambda one: unicodedata.category(one)[0] == "S"), 0.01),
    "! and ? a sentence": (lambda text: sum(map(text.whole.count, "!?！？؟")) / text.sentences, 0.05),
    "ends its last sentence": (lambda text: float(text.whole.rstrip().endswith(tuple(_ENDS))), 0.1),
}
"""Features by name: how each is counted, and its least spread."""


@metrics.register("style_distance")
class StyleDistance(Metric):
    """Distance of answers from the references in countable style."""

    name = "style_distance"
    better = "lower"
    beside = whole = ("style_delta",)
    settings = f"mean |z| of {len(FEATURES)} features, z by mean and deviation over the references of these rows"
    while_training = False

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """The row's mean |z|, its z of each feature, and 1."""
        z = _z_scores([row.answer or "" for row in rows], [row.reference for row in rows])
        return [[float(abs(of_row).mean()), *map(float, of_row), 1.0] for of_row in z]

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """Distance and delta."""
        rows, leanings = sums[-1], sums[1:-1]
        delta = sum(abs(total) for total in leanings) / rows / len(leanings)
        return {self.name: sums[0] / rows, "style_delta": delta}

    def tables(self, base: Sequence[RowScore], tuned: Sequence[RowScore]) -> tuple[ReportTable, ...]:
        """The distance of each side, and each feature's means and mean z, those first that are furthest off."""
        references = [row.reference for row in tuned]
        sides = [[row.answer or "" for row in rows] for rows in (base, tuned)]
        means = [_count(texts).mean(axis=0) for texts in (references, *sides)]
        leanings = [_z_scores(texts, references).mean(axis=0) for texts in sides]
        furthest = sorted(range(len(FEATURES)), key=lambda place: -max(abs(z[place]) for z in leanings))
        names = list(FEATURES)
        lines = tuple(
            (names[place], *(f"{mean[place]:.3f}" for mean in means), *(_signed(z[place]) for z in leanings))
            for place in furthest
        )
        own = [f"{abs(_z_scores(texts, references)).mean():.3f}" for texts in (references, *sides)]
        headings = ("feature", "references", "base", "tuned", "base, mean z", "tuned, mean z")
        distances = tuple(zip(("references themselves", "base", "tuned"), own, strict=True))
        return (
            ReportTable(
                "style_distances", "style_distance of references and answers", ("texts", "distance"), distances
            ),
            ReportTable(self.name, "style_distance: mean of each feature, furthest first", headings, lines),
        )


def _signed(value: float) -> str:
    """Two decimals with a sign, which a 0 has not."""
    shown = f"{value:+.2f}"
    return "0.00" if shown in ("+0.00", "-0.00") else shown


def _count(texts: Sequence[str]) -> NDArray[np.float64]:
    """Features of texts, `[texts, features]`."""
    import numpy as np

    return np.array([[count(_Text.of(text)) for count, _ in FEATURES.values()] for text in texts])


def _z_scores(texts: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """Features of texts in standard deviations from the references' mean, `[texts, features]`."""
    import numpy as np

    known = _count(references)
    spread = np.maximum(known.std(axis=0), [least for _, least in FEATURES.values()])
    found: NDArray[np.float64] = (_count(texts) - known.mean(axis=0)) / spread
    return found
