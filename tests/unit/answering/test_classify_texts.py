"""What `classify` reads: a text under the name that the run gave its column, or under lorafit's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafit.answering.classify import read_texts
from lorafit.contracts import Silent
from lorafit.errors import LorafitError
from lorafit.files.rundir import RunDir

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
