"""Numbers with their nouns."""

from __future__ import annotations

import pytest

from lorafit.console.wording import agreed, counted, list_classes

MORE = [(2.5, "2.5 rows"), (2.0, "2 rows"), (1234.567, "1,234.57 rows"), (0.00123, "0.0012 rows"), (0.999, "1 row")]


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1200, "1,200 rows"), (1.0, "1 row"), (2 / 3, "0.67 rows"), *MORE],
)
def test_a_number_has_its_noun(number: float, said: str) -> None:
    assert counted(number, "row") == said


def test_a_verb_goes_with_its_number() -> None:
    assert [f"{counted(number, 'row')} {agreed(number, 'is', 'are')}" for number in (0, 1, 2)] == [
        "0 rows are",
        "1 row is",
        "2 rows are",
    ]


def test_of_many_classes_the_rarest_are_named() -> None:
    assert list_classes({"ham": 1200, "spam": 0}) == "ham 1,200, spam 0"
    many = {f"class {number}": 40 - number for number in range(20)}
    said = "20 classes, 21 to 40 rows each; the fewest: class 19 21, class 18 22, class 17 23, class 16 24"
    assert list_classes(many) == said
