"""Whether answers are about what was asked, and of the domain of the rows, by embeddings of `evaluation.encoder`.

    domain_relevance         cosine with the middle of the other rows' references (their mean, of length 1)
    relevance_to_prompt      cosine with the user's last words of the row
    relevance_to_reference   cosine with the row's own reference
    relevance_margin         that, less the mean cosine with the references of all other rows

All are means over rows. A cosine means little by itself: any two texts of one domain have some. So the last value and
the table beside it say what answers reach by chance, with prompts and references of other rows. An answer about the
right thing with the wrong number in it has a high cosine all the same: that is what must_contain is for.

Source: Reimers and Gurevych (2019), "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks"; answer similarity
in Es et al. (2024), "RAGAS: Automated Evaluation of Retrieval Augmented Generation".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorafit.contracts import ReportTable
from lorafit.kinds.metrics import Metric, RowScore, metrics

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_VALUES = ("domain_relevance", "relevance_to_prompt", "relevance_to_reference", "relevance_margin")


@metrics.register("domain_relevance")
class DomainRelevance(Metric):
    """Cosines of answers with prompts and references, beside those of other rows."""

    name, beside = _VALUES[0], _VALUES[1:]
    condition = "a row with words of the user and a reference answer"
    settings = "cosine of embeddings, mean over rows; other rows' references and prompts for comparison"
    while_training = False
    embeds = "must"

    def usable(self, row: RowScore) -> bool:
        """Rows with a prompt and a reference that got an answer."""
        return super().usable(row) and bool(row.prompt.strip())

    def texts(self, row: RowScore) -> Sequence[str]:
        """Answer, prompt and reference."""
        return [row.answer or "", row.prompt, row.reference]

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """The four cosines of each row, and 1."""
        answers, prompts, references = self._vectors(rows)
        own = (answers * references).sum(axis=1)
        columns = (
            _to_middle(answers, references),
            (answers * prompts).sum(axis=1),
            own,
            own - _to_others(answers, references),
        )
        return [[*map(float, values), 1.0] for values in zip(*columns, strict=True)]

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The four means."""
        return {name: total / sums[-1] for name, total in zip(_VALUES, sums, strict=False)}

    def tables(self, base: Sequence[RowScore], tuned: Sequence[RowScore]) -> tuple[ReportTable, ...]:
        """Cosines with the row's own texts beside those with other rows', and those of the references themselves."""
        answers, prompts, references = self._vectors(tuned)
        named = {"base": self._vectors(base)[0], "tuned": answers, "references themselves": references}
        lines = tuple(
            (
                name,
                *(
                    f"{value.mean():.3f}"
                    for value in (
                        (texts * prompts).sum(axis=1),
                        _to_others(texts, prompts),
                        (texts * references).sum(axis=1),
                        _to_others(texts, references),
                        _to_middle(texts, references),
                    )
                ),
            )
            for name, texts in named.items()
        )
        headings = ("answers", "own prompt", "other prompts", "own reference", "other references", "their middle")
        title = "domain_relevance: cosines with a row's own texts and with others'"
        return (ReportTable(self.name, title, headings, lines),)

    def _vectors(self, rows: Sequence[RowScore]) -> list[NDArray[np.float64]]:
        """Embeddings of answers, prompts and references, each `[rows, width]`."""
        import numpy as np

        columns = zip(*(self.texts(row) for row in rows), strict=True)
        return [np.stack([row.vectors[text] for row, text in zip(rows, column, strict=True)]) for column in columns]


def _to_others(texts: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each text the mean cosine with the rows of `others` that are not its own, `[rows]`; of a lone row 0."""
    own = (texts * others).sum(axis=1)
    found: NDArray[np.float64] = (texts @ others.sum(axis=0) - own) / max(len(texts) - 1, 1)
    return found


def _to_middle(texts: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each text the cosine with the mean of the rows of `others` that are not its own, `[rows]`; of a lone row 0."""
    import numpy as np

    middles = others.sum(axis=0) - others
    lengths = np.linalg.norm(middles, axis=1)
    found: NDArray[np.float64] = (texts * middles).sum(axis=1) / np.where(lengths > 0, lengths, 1.0)
    return found
