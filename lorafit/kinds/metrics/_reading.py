"""What several metrics read in an answer: its final number, and whether two answers say the same."""

from __future__ import annotations

import re
from decimal import Decimal
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafit.kinds.metrics import RowScore

_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
_FINAL = re.compile(rf"####\s*\$?\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)


def read_final_number(text: str, *, marked: bool = False) -> Decimal | None:
    """The number behind the last `####`, else (unless `marked`) the last number in the text; None without one."""
    found = _FINAL.findall(text) or ([] if marked else _ANY.findall(text))
    return Decimal(found[-1].replace(",", "")) if found else None


def same_answer(row: RowScore, one: str, other: str) -> bool:
    """Whether two answers to a row are one: the same but for white space, or, where its reference ends in
    `#### number`, the same final number.
    """
    if read_final_number(row.reference, marked=True) is not None:
        return read_final_number(one) == read_final_number(other)
    return one.split() == other.split()


def likeness(row: RowScore, one: str, other: str) -> float:
    """How alike two answers are: 1 where they are equal, 0 where one alone is empty.

    With an encoder the cosine of their embeddings, which for unlike texts can fall a little below 0; without one
    chrF2 of both directions, 0 to 1.
    """
    if one.split() == other.split():
        return 1.0
    if not one.strip() or not other.strip():
        return 0.0
    if row.vectors:
        return float(row.vectors[one] @ row.vectors[other])
    chrf = _chrf()
    both = (chrf.sentence_score(one, [other]).score, chrf.sentence_score(other, [one]).score)
    return float(sum(both)) / 200


def shorten(text: str, letters: int = 160) -> str:
    """A text on one line of a table, its end left out where it is long."""
    flat = " ".join(text.split())
    return flat if len(flat) <= letters else flat[: letters - 1] + "…"


LIKENESS = "cosine of embeddings where evaluation.encoder is set, else mean chrF2 of both directions by sacrebleu"


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()
