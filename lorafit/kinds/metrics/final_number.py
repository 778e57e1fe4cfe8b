"""Share of answers whose final number is the reference's, for rows whose reference ends in `#### number`.

The number behind the last `####` counts; an answer without the mark is read by its last number. Compared as numbers, so
`1,080`, `1080.0` and `$1080` are one.

Source: GSM8K, Cobbe et al. (2021), "Training Verifiers to Solve Math Word Problems" (answers end in `#### number`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal

from lorafit.kinds.metrics import RowScore, metrics

_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
_FINAL = re.compile(rf"####\s*\$?\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)


def read_final_number(text: str, *, marked: bool = False) -> Decimal | None:
    """The number behind the last `####`, else (unless `marked`) the last number in the text; None without one."""
    found = _FINAL.findall(text) or ([] if marked else _ANY.findall(text))
    return Decimal(found[-1].replace(",", "")) if found else None


@metrics.register("final_number")
class FinalNumber:
    """Final number equal to the reference's."""

    needs: Literal["scores", "answers", "calls"] = "answers"
    reads: tuple[str, ...] = ()
    better: Literal["lower", "higher"] = "higher"
    during_training = False
    percent = True
    condition = "a row whose reference ends in '#### number'"
    companions: tuple[str, ...] = ()

    def usable(self, row: RowScore) -> bool:
        """Rows with a marked number in the reference that got an answer."""
        return row.answer is not None and read_final_number(row.reference, marked=True) is not None

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """1 or 0, and 1."""
        return [
            [float(read_final_number(row.answer or "") == read_final_number(row.reference, marked=True)), 1.0]
            for row in rows
        ]

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """The share."""
        return {"final_number": sums[0] / sums[1]}

    def signature(self) -> str:
        """Which number is read."""
        return "number behind the last ####, else the answer's last number"
