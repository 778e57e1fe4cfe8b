"""What `classify` reads: a text under the name that the run gave its column, or under lorafit's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafit import pipeline
from lorafit.answering.answer_rows import read_answers
from lorafit.answering.classify import Classifier, read_texts
from lorafit.answering.engine import Engine
from lorafit.contracts import Silent
from lorafit.errors import DataError, LorafitError, UsageError
from lorafit.files.rundir import RunDir
from lorafit.kinds.tasks import tasks

RECIPE = {
    "name": "x",
    "task": "sequence-classification",
    "model": {"base": "b"},
    "data": {"train": [{"path": "a.jsonl", "columns": {"text": "review", "label": "stars"}}]},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = RunDir(tmp_path / "run")
    folder.root.mkdir()
    folder.recipe.write_text(json.dumps(RECIPE), encoding="utf-8")
    folder.manifest.write_text("{}", encoding="utf-8")
    return folder.root


def texts(run: Path, name: str, content: str) -> list[str | None]:
    file = run.parent / name
    file.write_text(content, encoding="utf-8")
    return [sample.text for sample in read_texts(run, "text_label", None, file, None, Silent())]


def test_a_file_may_use_the_runs_names_or_ours(run: Path) -> None:
    for name in ("review", "text"):
        rows = [{name: "good", "stars": 5}, {name: "bad", "text2": "x"}]
        assert texts(run, "d.jsonl", "".join(json.dumps(row) + "\n" for row in rows)) == ["good", "bad"]
        assert texts(run, "d.csv", f"id,{name}\n1,good\n") == ["good"]
        assert [s.text for s in read_texts(run, "text_label", None, None, [{name: "good"}, "bad"], Silent())] == [
            "good",
            "bad",
        ]
    with pytest.raises(LorafitError, match="missing column 'review'; found body; name it so, or 'text'"):
        texts(run, "d.jsonl", '{"body": "good"}\n')


@pytest.mark.parametrize(
    ("name", "content"), [("d.csv", "text,label\n"), ("d.txt", "\n \n"), ("d.jsonl", "\n"), ("d.json", "[]")]
)
@pytest.mark.parametrize("kind", ["sequence-classification", "reward"])
def test_a_file_without_rows_is_told_before_a_model_is_loaded(run: Path, name: str, content: str, kind: str) -> None:
    def load() -> Engine:
        raise AssertionError("loaded")

    file = run.parent / name
    file.write_text(content, encoding="utf-8")
    classifier = Classifier(tasks.make(kind), 8, 0, load)
    with pytest.raises(DataError, match="no rows"):
        classifier.label(classifier.read(run, None, file, None, Silent()), Silent())
    with pytest.raises(DataError, match="no rows"):
        classifier.label(classifier.read(run, None, None, [], Silent()), Silent())


def test_advice_about_columns_is_what_the_command_can_do(run: Path) -> None:
    bare = run.parent / "bare"
    bare.mkdir()
    RunDir(bare).recipe.write_text(json.dumps(RECIPE | {"data": {"train": "a.jsonl"}}), encoding="utf-8")
    RunDir(bare).manifest.write_text("{}", encoding="utf-8")
    file = run.parent / "d.jsonl"
    file.write_text('{"texd": "good"}\n', encoding="utf-8")
    for rows in ({"input_file": file, "rows": None}, {"input_file": None, "rows": [{"texd": "good"}]}):
        with pytest.raises(LorafitError, match=r"did you mean 'texd'\? rename it$"):
            read_texts(bare, "text_label", None, reporter=Silent(), **rows)  # type: ignore[arg-type]
    file.write_text('{"frage": "a", "wort": "b"}\n', encoding="utf-8")
    for rows in ({"input_file": file, "rows": None}, {"input_file": None, "rows": [{"frage": "a", "wort": "b"}]}):
        with pytest.raises(LorafitError, match=r"; name them prompt and completion, or prompt, chosen and rejected$"):
            read_answers(bare, None, reporter=Silent(), **rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("ask", [pipeline.classify, pipeline.generate])
def test_a_prompt_beside_a_file_of_them_is_not_missing(run: Path, ask: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=r"^--prompt: is given beside --input; leave one of them out$"):
        ask(run, prompt="x", input_file=run / "MANIFEST.json")
    with pytest.raises(UsageError, match="needs a prompt"):
        ask(run)


@pytest.mark.parametrize("name", ["out.xlsx", "out", "out.json", "out.csv.gz"])
def test_labels_are_written_as_the_files_name_says_or_not_at_all(run: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"out.*is no table that is written; name it \.csv or \.jsonl"):
        pipeline.classify(run, prompt="x", output=run.parent / name)
