"""Share of answers whose final number is the reference's, for rows whose reference ends in `#### number`.

The number behind the last `####` counts; an answer without the mark is read by its last number. Compared as numbers, so
`1,080`, `1080.0` and `$1080` are one.

Source: GSM8K, Cobbe et al. (2021), "Training Verifiers to Solve Math Word Problems" (answers end in `#### number`).
"""

from __future__ import annotations

from lorafit.kinds.metrics import RowScore, ShareOfRows, metrics
from lorafit.kinds.metrics._reading import read_final_number


@metrics.register("final_number")
class FinalNumber(ShareOfRows):
    """Final number equal to the reference's."""

    name = "final_number"
    condition = "a row whose reference ends in '#### number'"
    settings = "number behind the last ####, else the answer's last number"

    def usable(self, row: RowScore) -> bool:
        """Rows with a marked number in the reference that got an answer."""
        return row.answer is not None and read_final_number(row.reference, marked=True) is not None

    def holds(self, row: RowScore) -> bool:
        """The same number."""
        return read_final_number(row.answer or "") == read_final_number(row.reference, marked=True)
