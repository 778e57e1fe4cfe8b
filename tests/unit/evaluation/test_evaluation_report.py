"""The report says what was found, in a table, in words and in JSON, and is written whole or not at all."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lorafit.answering.generate import Answer
from lorafit.answering.sampling import Sampling
from lorafit.contracts import GenerationRow, ShownSequence
from lorafit.evaluation.evaluation import About, Evaluation, Speed
from lorafit.evaluation.report import name_report, render_evaluation, render_markdown, write_report
from lorafit.evaluation.rows import Row, compare_rows, fill_text, find_worst, join_rows
from lorafit.files.rundir import RunDir
from lorafit.kinds.metrics import RowScore
from lorafit.pictures import PlacedPicture


def sums(loss: float, tokens: float, correct: float) -> dict[str, tuple[float, ...]]:
    return {"loss": (loss,), "weight": (tokens,), "tokens": (tokens,), "correct": (correct,)}


def build(answered=40, right=30, **changes):
    rows = tuple(
        Row(
            "test.jsonl",
            line,
            f"Question {line} [bold]?",
            RowScore(sums(40.0, 10, 2), "no idea", f"It takes {line} days", (f"{line} days",)),
            RowScore(
                sums(10.0 + line, 10, 8), f"```{line} days" if line > answered - right else "|", f"It takes {line} days"
            )
            if line > answered
            else RowScore(sums(10.0, 10, 8), f"{line} days" if line <= right else "a | b ```", "x", (f"{line} days",)),
        )
        for line in range(1, answered + 3)
    )
    comparisons, unscored = compare_rows(rows, ["must_contain", "perplexity"], seed=0)
    retention, _ = compare_rows(rows, ["loss"], seed=0)
    evaluation = Evaluation(
        about=About("support-bot", 120, "validation", True, 1_000_000, 135_000_000),
        comparisons=comparisons,
        unscored=unscored,
        rows=rows,
        worst=tuple(find_worst(rows, comparisons)),
        signatures={"must_contain": "all strings"},
        seconds=12.5,
        peak_memory_bytes=512 << 20,
        seed=0,
        sampling=Sampling(64),
        retention=retention,
        retention_rows=len(rows),
        base_speed=Speed(42, 420, 10.0, 3, 0),
        tuned_speed=Speed(42, 210, 7.0, 0, 1),
    )
    return replace(evaluation, **changes)


def draw(evaluation, columns=160, **options):
    console = Console(width=columns, record=True, file=io.StringIO())
    console.print(render_evaluation(evaluation, columns=columns, **options))
    return console.export_text()


def cells(text, metric):
    """The cells of a metric's line, which stand two blanks or more apart."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{metric} ")]
    return re.split(r" {2,}", line.strip())


def test_the_table_holds_base_tuned_difference_intervals_and_verdict():
    text = draw(build(), 140)
    found = cells(text, "must_contain")
    assert found[:3] == ["must_contain", "0.0 %", "75.0 %"]
    assert re.fullmatch(r"59\.8 % to 85\.8 %", found[3])
    assert found[4] == "+75.0 points"
    assert found[6:] == ["better", "30 / 0 of 40"]
    assert "better on 40 rows: must_contain" in text and "better on 42 rows: perplexity" in text
    assert "tuned score itself" not in text


def test_a_narrow_table_says_the_interval_of_the_tuned_score_below():
    text = " ".join(draw(build(), 80).split())
    assert re.search(r"95 % interval of the tuned score itself: must_contain 59\.8 % to 85\.8 %, perplexity \d", text)
    assert "tuned score itself" not in draw(
        build(5, 5, comparisons=compare_rows(build().rows[:5], ["loss"], seed=0)[0])
    )


WORST_CASE = ("token_accuracy", "final_number", "must_contain", "perplexity")


@cache
def compared(rows):
    (some,) = compare_rows(build(rows, rows).rows[:rows], ["must_contain"], seed=0)[0]
    return some


@pytest.mark.parametrize("columns", [80, 100, 120, 140, 160])
@pytest.mark.parametrize("rows", [5, 8, 250])
def test_the_table_fits_the_terminal(columns, rows):
    """Every value is whole, on one line, within the width; also where intervals are as long as they get."""
    some = compared(rows)
    longest = [
        replace(
            some,
            name=name,
            percent=name != "perplexity",
            base=1.0,
            tuned_low=1.0,
            tuned_high=1.0,
            difference=-0.999,
            low=-1.0,
            high=-0.876,
        )
        for name in WORST_CASE
    ]
    longest[3] = replace(longest[3], base=12345.6, tuned=1234.5, tuned_low=1111.1, tuned_high=12345.6)
    longest[3] = replace(longest[3], difference=-11111.1, low=-12222.2, high=-10000.1)
    text = draw(build(comparisons=tuple(longest)), columns)
    table = text.splitlines()[1 : 2 + len(longest)]
    assert max(map(len, table)) <= columns
    assert [line.split()[0] for line in table] == ["metric", *WORST_CASE]
    verdict = {5: "too few", 8: "better", 250: "better"}[rows]
    assert all(verdict in line and f"{rows} / 0" in line for line in table[1:])
    assert all(interval in line for line, interval in zip(table[1:], ["-100.0"] * 3 + ["-12222"], strict=True))
    assert "…" not in "".join(table)


def test_long_names_stay_whole_in_a_narrow_table():
    """The interval breaks instead, between its ends."""
    names = ("desirable_margin", "undesirable_reward", "ref_log_ratio_of_answers")
    signed = {"percent": False, "base": -0.04312, "tuned": 12.345, "difference": 12.388, "low": 11.512, "high": 13.245}
    lines = draw(
        build(comparisons=tuple(replace(compared(8), name=name, **signed) for name in names)), 80
    ).splitlines()[:8]
    assert max(map(len, lines)) <= 80
    for name in names:
        [(number, line)] = [(number, line) for number, line in enumerate(lines) if line.startswith(f"{name} ")]
        assert re.search(r"\+11\.51 to( |$)", line) and ("+13.2" in line or lines[number + 1].split() == ["+13.24"]), (
            lines
        )


def test_too_few_rows_say_so():
    text = draw(build(4, 3))
    assert "too few rows to tell (4 rows; a verdict needs 6): must_contain" in text
    assert "kept as far" not in text.split("retention")[0]
    assert "must_contain: 4 rows are too few to tell, from 0.0 % to 75.0 %" in render_markdown(build(4, 3))


def test_places_are_shown_as_the_caller_says():
    text = draw(build(), place=lambda file: f"here/{file}")
    assert "here/test.jsonl:31: must_contain" in text


def test_reports_of_other_rows_or_checkpoints_have_names_of_their_own():
    names = {
        name_report(split=split, limit=limit, checkpoint_step=step)
        for split in (None, "train")
        for limit in (None, 1, 2)
        for step in (None, 0, 4)
    }
    assert len(names) == 18 and "report" in names
    assert name_report(split="validation", limit=8, checkpoint_step=4) == "report.validation.first-8.step-4"
    changes: list[dict[str, Any]] = [
        *({"data.test": None}, {"data.test": [{"path": "a"}]}, {"data.test": [{"path": "b"}]}),
        *({"seed": 1}, {"seed": 2}, {f"evaluation.key_{n}": n for n in range(90)}),
    ]
    set_names = {name_report(split=None, limit=None, checkpoint_step=None, changed=each) for each in changes}
    assert len(set_names) == len(changes) and "report" not in set_names
    assert all(name.startswith("report.set-") and len(name) < 100 for name in set_names)


def test_the_report_says_what_a_reader_must_know():
    for text in (draw(build()), render_markdown(build())):
        assert "the validation rows were used twice" in text
        assert "adapter of step 120" in text
        assert "1,000,000 of 135,000,000 parameters (0.741 %)" in text
        assert "base model: 420 tokens in 42 answers, 10.0 s, 42.0 tokens/s; 3 answers cut" in text
        assert "1 prompt left no room" in text
        assert "peak memory 512 MiB" in text
        assert "must_contain: 2 of 42 rows left out" in text
        assert "retention: 42 rows" in text.lower()
        assert "gained on 42 rows: loss" in text or "gained: loss: better" in text
    assert "used twice" not in draw(build(about=About("x", None, "test", False)))
    assert "rows were trained on" in draw(build(about=About("x", None, "train", True)))


def test_worst_rows_are_shown_as_they_are():
    text = draw(build())
    assert "test.jsonl:31: must_contain 0 (base 0), loss 1 a token" in text
    assert "Question 31 [bold]?" in text
    markdown = render_markdown(build())
    assert "````text\na | b ```\n````" in markdown
    assert markdown.count("\n### test.jsonl:") == 10


def test_worst_rows_name_their_images_also_where_nothing_was_asked():
    image, score = PlacedPicture("a.png", "0", 3, 5, 0, start=0, end=1), RowScore(sums(1.0, 1, 0))
    answer, example = Answer("red", 1, 0.0, "stop"), SimpleNamespace(file="d.jsonl", line=1)
    question = GenerationRow([5], "<image>what", "red", (), "d.jsonl", 1, pictures=(image,))
    task = SimpleNamespace(show=lambda _: (ShownSequence([5, 6], [0, 1], pictures=(image,)),))
    for asked in ([question], []):
        rows = join_rows([example], [score], [score], asked, [answer] * len(asked), [answer] * len(asked))
        comparisons, _ = compare_rows(rows, ["loss"], seed=0)
        (worst,) = fill_text(find_worst(rows, comparisons), [example], task, SimpleNamespace(decode=str))
        assert worst.to_json()["images"] == ["a.png"]
        assert "images: a.png" in draw(build(worst=(worst,)))


def test_a_loss_of_general_ability_is_called_lost():
    good = build()
    rows = [replace(row, base=row.tuned, tuned=row.base) for row in good.rows]
    lost, _ = compare_rows(rows, ["loss"], seed=0)
    assert "lost: loss: worse on 42 rows" in render_markdown(replace(good, retention=lost))


def test_files_are_written_and_hold_the_same(tmp_path):
    evaluation = build()
    write_report(RunDir(tmp_path), evaluation)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["metrics"]["must_contain"]["tuned"] == 0.75
    assert found["metrics"]["must_contain"]["verdict"] == "better"
    assert found["metrics"]["must_contain"]["sentence"] == evaluation.comparisons[0].sentence
    assert found["retention"]["loss"]["rows"] == 42
    assert found["generation"]["tuned"]["tokens_per_second"] == 30.0
    assert found["trainable_share"] == pytest.approx(1 / 135)
    assert (found["split"], found["seen_in_training"], found["checkpoint_step"]) == ("validation", True, 120)
    assert found["worst_rows"][0]["line"] == 31
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert len(lines) == 42
    assert lines[0]["tuned"] == {"loss": 1.0, "tokens": 10, "correct": 8, "answer": "1 days"}
    assert (tmp_path / "report.md").read_text() == render_markdown(evaluation)


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_report(RunDir(tmp_path), build())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = build()
    rows = (*broken.rows, replace(broken.rows[0], tuned=RowScore(sums(math.nan, 1, 0))))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(RunDir(tmp_path), replace(broken, rows=rows))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_answers_nothing_is_said_about_generation():
    plain = build(base_speed=None, tuned_speed=None)
    assert "tokens/s" not in draw(plain)
    assert plain.to_json()["generation"] == {}
