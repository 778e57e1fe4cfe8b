"""Whether a prompt that is asked again gets the same answer: greedily in another batch, and drawn at a temperature.

    repeatability        share of rows whose answer, written alone, equals the one written beside other rows
    sampled_similarity   mean likeness of the pairs among `evaluation.draws` answers drawn at `draw_temperature`

Greedy answers are a function of the prompt, so that the first is 1.0 but for rounding: in bf16 and NF4 the shape of a
batch decides the last bits of logits, and two tokens that are all but equally likely can change places. The second says
how much a user who asks twice gets told the same.

Source: pairwise similarity of samples as in self-BLEU, Zhu et al. (2018), "Texygen: A Benchmarking Platform for Text
Generation Models", section 3; of a model's own samples, Manakul et al. (2023), "SelfCheckGPT: Zero-Resource Black-Box
Hallucination Detection for Generative Large Language Models".
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, takewhile
from statistics import mean

from lorafit.contracts import ReportTable
from lorafit.kinds.metrics import Metric, Question, RowScore, ShareOfRows, metrics
from lorafit.kinds.metrics._reading import LIKENESS, likeness, shorten

_EXAMPLES, _LETTERS_BEFORE = 5, 30


@metrics.register("repeatability")
class Repeatability(ShareOfRows):
    """The same answer alone as in a batch, to the letter."""

    name = "repeatability"
    condition = "a row that is answered"
    companions = ("sampled_similarity",)
    settings = "answers made as the report's, one by one: equal to the letter"
    while_training = False

    def usable(self, row: RowScore) -> bool:
        """Rows that got an answer."""
        return row.answer is not None

    def questions(self, row: RowScore, draws: int) -> Sequence[Question]:
        """The same in a batch of its own."""
        return (Question("alone", alone=True),)

    def holds(self, row: RowScore) -> bool:
        """The same text."""
        return all(reply.text == row.answer for reply in row.further[self.name])

    def tables(self, base: Sequence[RowScore], tuned: Sequence[RowScore]) -> tuple[ReportTable, ...]:
        """A few rows that got another answer alone, from shortly before the place where both part."""
        lines = []
        for model, rows in (("tuned", tuned), ("base", base)):
            for row in [row for row in rows if not self.holds(row)][:_EXAMPLES]:
                own, other = row.answer or "", row.further[self.name][0].text
                alike = takewhile(lambda pair: pair[0] == pair[1], zip(own, other, strict=False))
                start = max(0, sum(1 for _ in alike) - _LETTERS_BEFORE)
                shown = (shorten(f"{'…' if start else ''}{text[start:]}") for text in (own, other))
                lines.append((model, shorten(row.prompt), *shown))
        headings = ("model", "asked", "beside other rows", "alone")
        title = "repeatability: answers that were others alone, from where they part"
        return (ReportTable(self.name, title, headings, tuple(lines)),) if lines else ()


@metrics.register("sampled_similarity")
class SampledSimilarity(Metric):
    """How alike the answers are that a row gets when tokens are drawn."""

    name = "sampled_similarity"
    percent = True
    condition = "a row that is answered"
    settings = f"mean over pairs of draws, then over rows; {LIKENESS}"
    while_training = False
    embeds = "may"

    def usable(self, row: RowScore) -> bool:
        """Rows that got an answer."""
        return row.answer is not None

    def questions(self, row: RowScore, draws: int) -> Sequence[Question]:
        """So many draws."""
        return [Question(f"draw {draw}", draw=draw) for draw in range(1, draws + 1)]

    def texts(self, row: RowScore) -> Sequence[str]:
        """The draws."""
        return [reply.text for reply in row.further[self.name]]

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """The mean over the pairs of the row, and 1."""
        return [[mean(likeness(row, *pair) for pair in combinations(self.texts(row), 2)), 1.0] for row in rows]
