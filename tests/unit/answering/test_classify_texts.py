"""What `classify` reads: a text under the name that the run gave its column, or under lorafit's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafit.answering.classify import Classifier, read_texts
from lorafit.answering.engine import Engine
from lorafit.contracts import Silent
from lorafit.errors import DataError, LorafitError
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
