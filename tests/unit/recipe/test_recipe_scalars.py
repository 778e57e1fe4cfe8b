"""Unquoted words: what they mean, which are refused, and that what is dumped is read back."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.errors import RecipeError
from lorafit.recipe.reader import dump_yaml, read_scalar, read_tree
from lorafit.recipe.yaml_tree import Place, plain

MEANINGS: list[tuple[str, Any]] = [
    ("", None),
    ("~", None),
    ("null", None),
    ("NULL", None),
    ("true", True),
    ("False", False),
    ("0", 0),
    ("-7", -7),
    ("+7", 7),
    ("0x1F", 31),
    ("2e-4", 2e-4),
    ("2E4", 2e4),
    ("1e5", 1e5),
    (".5", 0.5),
    ("2.", 2.0),
    ("-1.5e+3", -1500.0),
    ("0.10", 0.1),
    ("0e0", 0.0),
    ("2024-01-01", "2024-01-01"),
    ("1.2.3", "1.2.3"),
    ("nan", "nan"),
    ("inf", "inf"),
    ("0,05", "0,05"),
    ("yesterday", "yesterday"),
    ("a:b", "a:b"),
    ("2_b", "2_b"),
    ("٣", "٣"),  # an Arabic digit three is no number in YAML
]


@pytest.mark.parametrize(("text", "value"), MEANINGS)
def test_a_word_means(text: str, value: Any) -> None:
    read = read_scalar(text)
    assert read == value
    assert type(read) is type(value)


UNCLEAR = [
    *("yes", "no", "on", "off", "y", "n", "Yes", "NO", "oN"),
    *("010", "00", "08", "-010", "+010", "01.5", "010e1", "0_1"),
    *("1:30", "12:30:45", "1:2:3.5", "-1:30"),
    *("1_000", "1_0.5", "1.0_0", "0x_f"),
    *("0o17", "0b11", "0X1F"),
    *(".inf", "-.INF", ".NaN"),
    *("1e999", "-1e999", "1e-999", "9" * 5000, "0." + "1" * 5000),
]


@pytest.mark.parametrize("text", UNCLEAR, ids=lambda text: text[:12])
def test_an_unclear_word_is_refused(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_scalar(text)
    assert "quote it" in caught.value.todo
    assert len(caught.value.what) < 120


@pytest.mark.parametrize(("text", "instead"), [("y", "true"), ("010", "10")])
def test_a_name_is_not_advised_to_be_a_switch_or_number(text: str, instead: str) -> None:
    (error,) = read_tree(f"name: {text}", Place("r.yaml", 1, 1))[1]
    assert error.todo == f'quote it ("{text}") if it is text, or write {instead}'
    (key,) = read_tree(f"{text}: 1", Place("r.yaml", 1, 1))[1]
    assert key.todo == f'quote it ("{text}")'


def test_what_a_refused_word_would_have_meant() -> None:
    """The refusals are not idle: PyYAML, which most tools use, reads these words as something else."""
    assert yaml.safe_load("[no, 010, 1:30, 1_000]") == [False, 8, 90, 1000]
    assert yaml.safe_load("2e-4") == "2e-4"


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_is_read_back(number: float) -> None:
    text = dump_yaml({"a": number})
    assert plain(read_tree(text, Place("x", 1, 1))[0]) == {"a": number}


@settings(deadline=None)
@given(st.integers(min_value=-(2**64), max_value=2**64))
def test_every_whole_number_is_read_back(number: int) -> None:
    assert read_scalar(str(number)) == number


TEXT = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], include_characters="\t\n", exclude_characters="\ufffe\uffff")
)
WORDS = st.sampled_from(
    [text for text, _ in MEANINGS] + UNCLEAR + ["a: b", "- a", "# a", "{", "'", '"', "*a", "&a", "!a", "<<"]
)


@settings(deadline=None)
@given(st.dictionaries(TEXT.filter(bool), st.lists(TEXT | WORDS, max_size=3), max_size=3))
def test_every_text_is_read_back(values: dict[str, list[str]]) -> None:
    tree, errors = read_tree(dump_yaml(values), Place("x", 1, 1))
    assert errors == []
    assert plain(tree) == values
