"""What recipes/data/README.md says of the financial questions and of the code."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lorafit.kinds.metrics.must_contain import holds_all

DATA = Path(__file__).resolve().parents[3] / "recipes" / "data"


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower()))


def test_each_answer_about_money_is_asked_for_three_times_and_tested_once() -> None:
    train, test = read("finance_train"), read("finance_test")
    asked = Counter(row["answer"] for row in train)
    assert len(asked) == 24 and set(asked.values()) == {3}
    assert Counter(row["answer"] for row in test) == dict.fromkeys(asked, 1)
    assert len({row["question"] for row in (*train, *test)}) == 96
    for row in test:
        assert [answer for answer in asked if holds_all(answer, row["must_contain"])] == [row["answer"]]
        assert not holds_all(row["question"], row["must_contain"])
        near = [words(row["question"]) & words(other["question"]) for other in train]
        assert max(len(one) / len(words(row["question"])) for one in near) < 0.6


@pytest.mark.parametrize(("split", "count", "functions"), [("train", 64, 32), ("test", 12, 12)])
def test_the_code_does_what_the_instruction_asks(split: str, count: int, functions: int) -> None:
    rows = read(f"code_{split}")
    assert len({row["instruction"] for row in rows}) == count == len(rows)
    assert len({row["output"] for row in rows}) == functions
    for row in rows:
        names: dict[str, Any] = {}
        exec(row["output"], names)  # written for this project
        assert eval(row["check"], names), row["instruction"]


def test_no_tested_function_is_trained() -> None:
    trained = {re.search(r"def (\w+)", row["output"])[1] for row in read("code_train")}  # type: ignore[index]
    assert not {re.search(r"def (\w+)", row["output"])[1] for row in read("code_test")} & trained  # type: ignore[index]
