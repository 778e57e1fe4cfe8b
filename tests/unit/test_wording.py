"""Numbers with their nouns."""

from __future__ import annotations

import pytest

from lorafit.wording import counted


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1200, "1,200 rows"), (1.0, "1 row"), (2 / 3, "0.666667 rows")],
)
def test_a_number_has_its_noun(number: float, said: str) -> None:
    assert counted(number, "row") == said
