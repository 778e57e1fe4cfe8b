"""Share of answers that equal the reference once outer blanks are cut and inner blanks collapsed. Case counts."""

from __future__ import annotations

from lorafit.kinds.metrics import RowScore, ShareOfRows, metrics


def normalize(text: str) -> str:
    """`text` with every stretch of white space, line ends included, as one blank, and none outside."""
    return " ".join(text.split())


@metrics.register("exact_match")
class ExactMatch(ShareOfRows):
    """Answer equal to reference, white space apart."""

    name = "exact_match"
    settings = "white space collapsed, case kept"

    def holds(self, row: RowScore) -> bool:
        """Equal once both are normalised."""
        return normalize(row.answer or "") == normalize(row.reference)
