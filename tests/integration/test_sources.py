"""Sources of every kind through the commands: patterns, packed files and tables of Excel train, resume and estimate."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from tests.support.tiny_recipe import make_rows
from tests.support.world import World, say_all


def write_packed(world: World, name: str, first: int) -> None:
    path = world.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in make_rows(6, first=first))
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))


def test_a_pattern_of_packed_files_is_a_source_like_any_other(world: World) -> None:
    for number, name in enumerate(("rows/a.jsonl.gz", "rows/b.jsonl.gz", "rows/deep/c.jsonl.gz")):
        write_packed(world, name, 10 * number)
    world.recipe(("train: d.jsonl", "train: 'rows/**/*.jsonl.gz'"))
    shown = world.run("preview", "r.yaml", "--json")
    assert shown.code == 0, shown.stderr
    sources = shown.json["report"]["splits"]["train"]["sources"]
    assert [(source["file"], source["kept"]) for source in sources] == [
        ("rows/a.jsonl.gz", 6),
        ("rows/b.jsonl.gz", 6),
        ("rows/deep/c.jsonl.gz", 6),
    ]
    estimated = world.run("estimate-memory", "r.yaml", "--json")
    assert estimated.code == 0 and '"rows": 18' in re.sub(r"\s+", " ", estimated.stdout), estimated.stdout
    say_all(world.run("train", "r.yaml", "--output", "rows"), 2, "rows", "also an input")
    say_all(world.run("train", "r.yaml"), 0)
    say_all(world.run("train", "r.yaml", "--resume"), 0, "already complete")
    say_all(world.run("eval", "run", "--split", "train", "--limit", "2"), 0, "rows/a.jsonl.gz:1")
    write_packed(world, "rows/d.jsonl.gz", 50)  # one more file that the pattern finds
    say_all(world.run("train", "r.yaml", "--resume"), 6, "data changed")


def test_a_pattern_without_files_is_named_where_the_recipe_names_it(world: World) -> None:
    line = world.recipe(("train: d.jsonl", "train: rows/*.jsonl"))
    say_all(world.run("train", "r.yaml"), 4, f"r.yaml:{line}", "rows/*.jsonl: no file matches the pattern")
    assert not (world.root / "run").exists()
    say_all(world.run("estimate-memory", "r.yaml"), 0)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_table_that_excel_wrote_with_semicolons(world: World, mapped: bool) -> None:
    header = "Nr;Frage;Antwort;Preis" if mapped else "id;question;answer;price"
    rows = "".join(f'{n};"Was kostet; {n}?";"{n},50 €, inkl. MwSt";{n},50\r\n' for n in range(8))
    (world.root / "d.csv").write_bytes(f"\ufeff{header}\r\n{rows};;;\r\n".encode())
    columns = ", columns: {question: Frage, answer: Antwort}" if mapped else ""
    world.recipe(("train: d.jsonl", f"train: {{path: d.csv{columns}}}"))
    shown = world.run("preview", "r.yaml", "--rows", "1", "--json")
    assert shown.code == 0, shown.stderr
    assert "Was kostet; 0?" in shown.json["rows"][0]["rendering"]
    assert "0,50 €, inkl. MwSt" in shown.json["rows"][0]["rendering"]
    assert shown.json["report"]["splits"]["train"]["rows"] == 8


def test_a_kind_that_does_not_exist_yet_says_so(world: World) -> None:
    line = world.recipe(("train: d.jsonl", "train: {path: d.jsonl, format: ranking}"))
    refused = world.run("validate", "r.yaml")
    say_all(refused, 3, f"r.yaml:{line}", "format 'ranking' does not exist yet", "question_answer")
    world.recipe()
    refused = world.run("validate", "r.yaml", "--set", "task=simpo")
    say_all(refused, 3, "task 'simpo' does not exist yet; available: causal-lm")


def test_train_says_and_stores_what_became_of_the_rows(world: World) -> None:
    rows = make_rows(12)
    lines = [json.dumps(row) for row in rows]
    lines[3], lines[8] = "{oops}", '{"question": "", "answer": "a"}'
    lines.append(json.dumps({**rows[0], "answer": "something else"}))
    (world.root / "d.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    world.recipe(("max_length: 128", "max_length: 128\n  bad_rows: {policy: skip, max_fraction: 0.2}"))
    trained = world.run("train", "r.yaml")
    say_all(trained, 0)
    assert "2 rows skipped, since they cannot be trained on (d.jsonl:4, d.jsonl:9)" in trained.stderr
    assert "train: 1 question with different answers, e.g. d.jsonl:1 and d.jsonl:13" in trained.stderr
    stored = json.loads((world.root / "run" / "data.json").read_text(encoding="utf-8"))
    part = stored["splits"]["train"]
    assert [(note["what"], note["line"]) for note in part["notes"]] == [("bad", 4), ("bad", 9)]
    assert [part["sources"][0][name] for name in ("file", "read", "kept", "bad")] == ["d.jsonl", 13, 11, 2]
    assert stored["contradictions"]["places"] == [["d.jsonl:1", "d.jsonl:13"]]
    assert all(warning in trained.stderr.replace("\n", " ") for warning in stored["warnings"])
