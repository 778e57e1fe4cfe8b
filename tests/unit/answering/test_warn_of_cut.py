"""Answers that were cut say so, and labels of a file's lines stand where its lines do."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lorafit.answering.generate import Answer
from lorafit.answering.opening import warn_of_cut
from lorafit.console.reporting import Printed, result_console
from lorafit.contracts import Sample, Silent
from lorafit.run.answered import Classified, Generated


def test_answers_that_were_cut_are_counted() -> None:
    reporter = Silent()
    ends = [("stop", 8), ("length", 8), ("length", 8), ("length", 3), ("no_room", 0)]
    warn_of_cut([Answer("a", tokens, 0.0, ended) for ended, tokens in ends], 8, reporter)  # type: ignore[arg-type]
    assert reporter.warnings == [
        "2 of 5 answers are cut at 8 tokens; raise --max-new-tokens",
        "2 of 5 answers are cut at the model's last position; shorten the prompt",
    ]
    reporter = Silent()
    warn_of_cut([Answer("a", 8, 0.0, "stop")], 8, reporter)
    assert reporter.warnings == []


def test_labels_are_aligned_with_the_lines_of_a_file() -> None:
    places = [("x.txt", 1), ("x.txt", 4), ("y.txt", 2), ("z.csv", 3)]
    texts = [Sample(file, line, text=f"{file} {line}", labels=()) for file, line in places]
    found = [{"labels": ["a"], "probabilities": {"a": 1.0}} for _ in texts]
    stream = io.StringIO()
    Classified(texts, found).render(Console(file=stream, width=80))
    shown = [line.partition("  ")[2] for line in stream.getvalue().splitlines()]
    assert shown == ["x.txt 1", "", "", "x.txt 4", "", "y.txt 2", "z.csv 3"]


TYPED = Sample("x:100:.csv", 2, prompt="say :smile:", text="so :smile:")
ANSWER = Answer("well :smile:", 3, 0.0, "stop")


@pytest.mark.parametrize(
    "result",
    [
        Generated([TYPED], [ANSWER], None),
        Generated([TYPED], [ANSWER], [ANSWER]),
        Classified([TYPED], [{"labels": [":smile:"], "probabilities": {":smile:": 1.0}}]),
    ],
)
def test_texts_become_no_emoji(result: Printed, capsys: pytest.CaptureFixture[str]) -> None:
    result.render(result_console())
    for text in (str(result), capsys.readouterr().out):
        assert text.count(":smile:") >= 2 and "😄" not in text


def test_classified_texts_cannot_steer_the_terminal() -> None:
    found = {"labels": ["a"], "probabilities": {"a": 1.0}}
    assert "so\\x1b[2J\\x07" in str(Classified([Sample("x.csv", 2, text="so\x1b[2J\x07", labels=())], [found]))
