"""Ratings in a file: none is lost, and none spoils another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafit.errors import DataError
from lorafit.serving import feedback as feedback_module
from lorafit.serving.errors import ApiError
from lorafit.serving.feedback import Feedback

ROW = {"prompt": [], "completion": [], "model": "a"}


def test_a_rating_behind_a_line_without_an_end_is_a_line_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "ratings.jsonl"
    file.write_text(json.dumps({**ROW, "label": True}))
    feedback = Feedback(file)
    feedback.remember("x", [dict(ROW)])
    feedback.rate("x", 0, is_good=False)
    assert Feedback(file).ratings == {"a": (1, 2)}


def test_a_rating_that_cannot_be_written_may_be_given_again(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    feedback = Feedback(tmp_path / "f" / "ratings.jsonl")
    feedback.remember("x", [dict(ROW)])
    (tmp_path / "f" / "ratings.jsonl").unlink()
    (tmp_path / "f").rmdir()
    with pytest.raises(ApiError, match="cannot be written") as told:
        feedback.rate("x", 0, is_good=True)
    assert told.value.status == 500 and feedback.ratings == {}
    (tmp_path / "f").mkdir()
    feedback.rate("x", 0, is_good=True)
    assert feedback.ratings == {"a": (1, 1)}


def test_a_choice_that_the_answer_has_not_is_told_as_such(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / "ratings.jsonl")
    feedback.remember("x", [dict(ROW), dict(ROW)])
    with pytest.raises(ApiError, match="the answer has 2 choices, the first of which is 0, and no 2") as told:
        feedback.rate("x", 2, is_good=True)
    assert (told.value.status, told.value.param) == (400, "choice")
    feedback.rate("x", 1, is_good=True)


def test_of_many_or_long_answers_the_oldest_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback_module, "_REMEMBERED_CHARACTERS", 10_000)
    feedback = Feedback(tmp_path / "ratings.jsonl")
    for round_ in range(3):  # what was rated takes no room any more
        for number in range(4):
            feedback.remember(f"{round_} {number}", [{**ROW, "prompt": ["x" * 3_000]}])
        with pytest.raises(ApiError, match="no answer"):
            feedback.rate(f"{round_} 0", 0, is_good=True)
        for number in (1, 2, 3):
            feedback.rate(f"{round_} {number}", 0, is_good=True)
    assert feedback._characters == 0


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xff\xfe\n")
    with pytest.raises(DataError, match="UTF-8"):
        Feedback(tmp_path / "f")
