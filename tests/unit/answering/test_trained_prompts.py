"""What a run keeps of the questions that it was trained on, and where they are found again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorafit.answering.trained_prompts import read_prompts
from lorafit.contracts import Sample, Silent
from lorafit.data.prompt_texts import asked_text, draw_prompts
from lorafit.errors import ModelError
from lorafit.job import open_job
from lorafit.run.workspace import open_run
from tests.support.tiny_recipe import make_rows, train_tiny, write_rows

QUESTIONS = [row["question"] for row in make_rows(24)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its train.jsonl holds one question twice."""
    return train_tiny(tmp_path_factory.mktemp("prompts"), train=[*make_rows(24), *make_rows(1)])


def test_a_run_keeps_each_question_of_its_training_rows_once(run: Path) -> None:
    told = json.loads((run / "prompts.json").read_text())
    assert told == {"format": 1, "rows": 25, "prompts": QUESTIONS}
    for place in ("", "adapter", "checkpoints/step-000002", "checkpoints/step-000002/adapter"):
        assert read_prompts(run / place, Silent()) == QUESTIONS


def test_an_earlier_run_has_them_drawn_again_unless_its_rows_changed(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parent, tmp_path / "w")
    old = tmp_path / "w" / "run"
    (old / "prompts.json").unlink()
    with pytest.raises(ModelError, match="an earlier lorafit trained it"):
        read_prompts(old, Silent(), draws=False)
    assert read_prompts(old, Silent()) == QUESTIONS
    write_rows(old.parent / "train.jsonl", make_rows(24, first=1))
    with pytest.raises(ModelError, match="rows are others than it was trained on"):
        read_prompts(old, Silent())
    (old.parent / "train.jsonl").unlink()
    with pytest.raises(ModelError, match=r"cannot be read: .*no such file"):
        read_prompts(old, Silent())


def test_an_adapter_alone_has_those_that_lie_beside_it(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(run / "adapter", alone)
    with pytest.raises(ModelError, match="lies in no run") as told:
        read_prompts(alone, Silent())
    assert "prompts.json" in (told.value.todo or "")
    shutil.copy(run / "prompts.json", alone)
    assert read_prompts(alone, Silent()) == QUESTIONS


@pytest.mark.parametrize(
    "broken", [{"prompts": "what opens"}, {"prompts": [1]}, {"prompts": [" "]}, {"prompts": []}, {}]
)
def test_a_file_without_prompts_is_refused(run: Path, tmp_path: Path, broken: Any) -> None:
    shutil.copytree(run / "adapter", tmp_path / "alone")
    (tmp_path / "alone" / "prompts.json").write_text(json.dumps(broken))
    with pytest.raises(ModelError, match="holds no"):
        read_prompts(tmp_path / "alone", Silent())


TURNS = (
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "?"},
)


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        (
            Sample("f", 1, messages=(*TURNS, {"role": "user", "content": [{"type": "text", "text": "Open?"}]})),
            "Hi\n\nOpen?",
        ),
        (Sample("f", 1, prompt=" Q: open? ", completion="yes"), "Q: open?"),
        (Sample("f", 1, text="a story"), "a story"),
        (Sample("f", 1, messages=TURNS[:1]), ""),
    ],
)
def test_what_is_asked_is_the_user_s_text_alone(sample: Sample, text: str) -> None:
    assert asked_text(sample) == text


def test_of_many_a_few_are_drawn_by_the_seed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.data.prompt_texts.MOST_PROMPTS", 5)
    job = open_job(open_run(run).loaded, Silent())
    few = draw_prompts(job.rows, 0)
    assert len(few) == 5 and few == [text for text in QUESTIONS if text in few]
    assert draw_prompts(job.rows, 0) == few != draw_prompts(job.rows, 1)


def test_rows_that_are_held_out_are_not_kept(run: Path) -> None:
    job = open_job(open_run(run, ["data.validation={fraction: 0.25}"]).loaded, Silent())
    kept = draw_prompts(job.rows, 0)
    assert 0 < len(kept) == len(set(kept)) < len(QUESTIONS)
    held_out = {int(line) for line in job.rows.splits["validation"].lines} - {25}
    assert not {QUESTIONS[line - 1] for line in held_out if line > 1} & set(kept)
