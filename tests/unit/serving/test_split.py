"""A split gives each user one model, users in its shares, and says what ratings can tell apart."""

from __future__ import annotations

import pytest

from lorafit.errors import UsageError
from lorafit.serving.split import Split, read_split


def test_users_are_dealt_in_the_shares_and_stay_where_they_are() -> None:
    split = Split({"a": 0.9, "b": 0.1})
    users = [f"user-{number}" for number in range(4000)]
    picked = [split.pick(user) for user in users]
    assert picked == [split.pick(user) for user in users]
    assert abs(picked.count("a") / 4000 - 0.9) < 0.02
    grown = Split({"a": 0.8, "b": 0.2})  # a larger share takes users from others and gives none away
    assert all(
        after == "b"
        for user, before in zip(users, picked, strict=True)
        if before == "b"
        for after in [grown.pick(user)]
    )


def test_without_a_user_chance_decides() -> None:
    split = Split({"a": 0.5, "b": 0.5})
    assert {split.pick(None) for _ in range(64)} == {"a", "b"}


@pytest.mark.parametrize("given", ["a=0.9,b=0.1", {"a": 0.9, "b": 0.1}])
def test_both_forms_of_a_split(given: object) -> None:
    assert read_split(given) == Split({"a": 0.9, "b": 0.1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given", ["", "a", "a=1", "a=0.5,a=0.5", "a=x,b=0.5", "a=0.5,b=0.6", "a=nan,b=0.5", "=0.5,b=0.5"]
)
def test_what_is_no_split(given: str) -> None:
    with pytest.raises(UsageError):
        read_split(given)


def test_a_model_that_is_named_twice() -> None:
    with pytest.raises(UsageError, match="'a' is named twice"):
        read_split("a=0.9,a=0.3")


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [((50, 100), (50, 100), "not distinguishable"), ((50, 100), (80, 100), "better"), ((80, 100), (50, 100), "worse")],
)
def test_the_report_compares_with_the_first(a: tuple[int, int], b: tuple[int, int], verdict: str) -> None:
    first, second = Split({"a": 0.5, "b": 0.5}).report({"a": a, "b": b})["models"]
    assert "verdict" not in first and second["verdict"] == verdict
    assert second["difference"] == pytest.approx(b[0] / b[1] - a[0] / a[1])
    assert Split({"a": 0.5, "b": 0.5}).report({})["models"][1]["interval"] is None
