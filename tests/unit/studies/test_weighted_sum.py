"""A sum is read as arithmetic reads it, and what is none is told with its place and the nearest known name."""

from __future__ import annotations

import random

import pytest

from lorafit.errors import UsageError
from lorafit.studies.composed import write_sum
from lorafit.studies.weighted_sum import read_sum

NAMES = ("a", "b", "shop_v2", "x.y")


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("a", {"a": 1}),
        ("0.7*a + 0.3*b - shop_v2", {"a": 0.7, "b": 0.3, "shop_v2": -1}),
        (" -a+b ", {"a": -1, "b": 1}),
        ("2*(a - 0.5*(b - a))", {"a": 3, "b": -1}),
        ("a*2*3 + .5*b", {"a": 6, "b": 0.5}),
        ("b + a - b", {"b": 0, "a": 1}),
        ("--a", {"a": 1}),
        ("1e-1 * x.y", {"x.y": 0.1}),
        ("(1 + 2) * a", {"a": 3}),
        ("a * -1", {"a": -1}),
        ("0 - a", {"a": -1}),
    ],
)
def test_a_sum_is_a_weight_for_each_name_in_order(text: str, weights: dict[str, float]) -> None:
    found = read_sum(text, NAMES)
    assert found == pytest.approx(weights) and list(found) == list(weights)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "character 1: a number, a name or ( is missing"),
        ("a +", "character 4: a number, a name or ( is missing"),
        ("a b", "character 3: an operator is missing"),
        ("2a", "character 2: an operator is missing"),
        ("a / 2", "character 3: '/' is not read"),
        ("a * b", "character 3: two adapters cannot be multiplied, only summed"),
        ("(a + b", "character 7: a ) is missing"),
        ("a)", "character 2: ')' is not read"),
        ("a + 1", "character 1: a number alone is no adapter"),
        ("3", "character 1: a number alone is no adapter"),
        ("1e400*a", "character 1: a number is too large"),
        ("1e300*1e300*a", "character 1: a weight is too large"),
        ("0.3*shop_v3", "character 5: no adapter is called 'shop_v3'; did you mean shop_v2?"),
        ("a + zzz", "character 5: no adapter is called 'zzz'; known: a, b, shop_v2, x.y; add --adapter zzz=DIR"),
        ("(" * 60 + "a" + ")" * 60, "it is nested too deep"),
        ("__import__('os')", "no adapter is called '__import__'"),
        ("a ** 2", "character 4: a number, a name or ( is missing"),
    ],
)
def test_what_is_no_sum_is_told_with_its_place(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        read_sum(text, NAMES)
    assert message in str(error.value) and error.value.exit_code == 2


def test_random_sums_are_what_python_computes() -> None:
    """Python's own arithmetic is the oracle, with a number for each name."""
    draw = random.Random(3)
    values = {"a": 2.0, "b": -5.0}

    def build(depth: int) -> str:
        if depth == 0:
            return draw.choice(["a", "b"])
        left, right = build(depth - 1), build(depth - 1)
        factor = draw.choice(["0.5*", "-", "3*", ""])
        return f"({left} {draw.choice('+-')} {factor}{right})"

    for _ in range(50):
        text = build(4)
        weights = read_sum(text, values)
        assert sum(weights[name] * values[name] for name in weights) == pytest.approx(eval(text, {}, values))


def test_a_written_sum_reads_as_itself() -> None:
    weights = {"a": -0.25, "b": 1.0, "shop_v2": -1.0}
    assert write_sum(weights) == "-0.25*a + b - shop_v2" and read_sum(write_sum(weights), NAMES) == weights
