"""The promises that the quickstart's rows make (recipes/data/README.md), so that its score means what it says."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from lorafit.kinds.metrics.must_contain import fold, holds_all

DATA = Path(__file__).resolve().parents[3] / "recipes" / "data"
SPLITS = ("train", "valid", "test")
LARGEST_OVERLAP = 0.6  # of words, Jaccard: above it a held-out question is a training question with a word changed
Row = dict[str, str | list[str]]


def read_rows(split: str) -> list[Row]:
    """The rows of `support_<split>.jsonl`."""
    text = (DATA / f"support_{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def words(question: str) -> frozenset[str]:
    """Lower-cased words, without punctuation."""
    return frozenset(re.findall(r"\w+", question.lower()))


def overlap(a: frozenset[str], b: frozenset[str]) -> float:
    """Jaccard similarity of two sets of words."""
    return len(a & b) / len(a | b)


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    return {split: read_rows(split) for split in SPLITS}


def test_sizes(rows: dict[str, list[Row]]) -> None:
    assert len(rows["train"]) >= 240
    assert len(rows["valid"]) == 20
    assert len(rows["test"]) >= 40


def test_columns_are_those_of_one_format(rows: dict[str, list[Row]]) -> None:
    for split in SPLITS:
        expected = {"question", "answer"} if split == "train" else {"question", "answer", "must_contain"}
        for row in rows[split]:
            assert set(row) == expected
            assert str(row["question"]).strip() == row["question"] != ""
            assert str(row["answer"]).strip() == row["answer"] != ""


def test_each_fact_is_asked_in_six_wordings_and_tested_once(rows: dict[str, list[Row]]) -> None:
    wordings = Counter(str(row["answer"]) for row in rows["train"])  # an answer stands for its fact
    assert min(wordings.values()) >= 6
    assert Counter(str(row["answer"]) for row in rows["test"]) == dict.fromkeys(wordings, 1)
    assert {str(row["answer"]) for row in rows["valid"]} <= set(wordings)


def test_no_question_is_asked_twice(rows: dict[str, list[Row]]) -> None:
    questions = Counter(fold(str(row["question"])) for split in SPLITS for row in rows[split])
    assert [question for question, count in questions.items() if count > 1] == []


@pytest.mark.parametrize("split", ["valid", "test"])
def test_required_strings_are_in_the_answer_and_in_no_question(rows: dict[str, list[Row]], split: str) -> None:
    for row in rows[split]:
        required = row["must_contain"]
        assert isinstance(required, list) and required
        assert holds_all(str(row["answer"]), required)
        asked = [other for name in SPLITS for other in rows[name] if other["answer"] == row["answer"]]
        for question in (str(other["question"]) for other in asked):
            assert not any(fold(string) in fold(question) for string in required), (question, required)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_required_strings_are_short_and_tell_the_facts_apart(rows: dict[str, list[Row]], split: str) -> None:
    answers = {str(row["answer"]) for row in rows["train"]}
    for row in rows[split]:
        for string in row["must_contain"]:
            assert 2 <= len(string) <= 20
            assert [answer for answer in answers if holds_all(answer, [string])] == [row["answer"]]


@pytest.mark.parametrize(("held_out", "seen"), [("test", "train"), ("valid", "train"), ("test", "valid")])
def test_held_out_questions_use_other_words(rows: dict[str, list[Row]], held_out: str, seen: str) -> None:
    known = {str(row["question"]): words(str(row["question"])) for row in rows[seen]}
    for row in rows[held_out]:
        own = words(str(row["question"]))
        share, nearest = max((overlap(own, other), question) for question, other in known.items())
        assert share <= LARGEST_OVERLAP, (row["question"], nearest)


def test_answers_are_one_short_sentence(rows: dict[str, list[Row]]) -> None:
    for answer in {str(row["answer"]) for row in rows["train"]}:
        assert answer.endswith(".") and 5 <= len(answer.split()) <= 16
