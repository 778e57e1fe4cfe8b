"""Rows of every file type, with the lines they stand on."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.contracts import Sample, Silent
from lorafit.data.sources import lines, tables
from lorafit.data.sources.sample_set import read_sources
from lorafit.errors import LorafitError
from lorafit.recipe.schema import BadRowsSection, SourceSection


def samples(folder: Path, name: str, **section: Any) -> list[Sample]:
    return list(read_sources([SourceSection(path=name, **section)], folder, BadRowsSection(), Silent()))


def refusal(folder: Path, name: str, **section: Any) -> str:
    with pytest.raises(LorafitError) as caught:
        samples(folder, name, **section)
    return str(caught.value)


def texts(found: list[Sample]) -> list[tuple[int, str | None]]:
    return [(sample.line, sample.text) for sample in found]


def test_json_array_with_lines(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    assert texts(samples(tmp_path, "a.json")) == [(2, "a"), (5, "b")]
    (tmp_path / "b.json").write_text("\ufeff" + json.dumps(rows) + "\n", encoding="utf-8")
    assert texts(samples(tmp_path, "b.json")) == [(1, "a"), (1, "b")]


def test_json_object_that_wraps_one_list(tmp_path: Path) -> None:
    wrapped = {"version": 1, "names": ["x"], "data": [{"text": "a"}, {"text": "b"}]}
    (tmp_path / "a.json").write_text(json.dumps(wrapped, indent=1), encoding="utf-8")
    assert texts(samples(tmp_path, "a.json")) == [(7, "a"), (10, "b")]
    (tmp_path / "b.json").write_text(json.dumps({"train": [{"text": "a"}], "test": [{"text": "b"}]}), encoding="utf-8")
    assert "several lists of objects: train, test" in refusal(tmp_path, "b.json")


def test_json_file_that_is_one_row_or_a_row_a_line(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "one.json").write_text(json.dumps(chat, indent=1), encoding="utf-8")
    assert len(samples(tmp_path, "one.json")) == 1
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    assert texts(samples(tmp_path, "lines.json")) == [(1, "a"), (2, "b")]
    (tmp_path / "bad.json").write_text('{"text": "a}\n{"text": "b"}\n', encoding="utf-8")
    assert "bad.json:1" in refusal(tmp_path, "bad.json")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b'[\n{"text": "a"},\n{"text": NaN}]', ["d.json:3", "NaN"]),
        (b'[\n{"text": "a"},\n{"text": "b", "text": "c"}]', ["d.json:3", "duplicate key"]),
        (b'[\n{"text": "a"},\n{"text": "\\ud800"}]', ["d.json:3", "surrogate"]),
        (b'[\n{"text": "a"},\n{oops}\n]', ["d.json:3", "invalid JSON"]),
        (b'[\n{"text": "a"}\n{"text": "b"}]', ["d.json:3", "invalid JSON"]),
        (b'[\n{"text": "a"},\n{"text": "b', ["d.json:3", "truncated or invalid JSON"]),
        (b'[\n{"text": "a"},\n', ["d.json:2", "truncated or invalid JSON"]),
        (b'[\n{"text": "a"},\n"x"]', ["d.json:3", "expected an object"]),
        (b'[\n{"text": "a"},\n{"text": ' + b"[" * 3000 + b"]" * 3000 + b"}]", ["d.json:3", "nested deeper"]),
        (b'[\n{"text": "caf\xe9"}]', ["d.json:2", "UTF-8"]),
        (b'[\n{"text": "a\0"}]', ["d.json:2", "NUL"]),
        (b"[]", ["d.json", "no rows"]),
        (b"17", ["d.json:1", "expected an array"]),
    ],
)
def test_json_faults(tmp_path: Path, content: bytes, parts: list[str]) -> None:
    (tmp_path / "d.json").write_bytes(content)
    said = refusal(tmp_path, "d.json")
    assert all(part in said for part in parts), said


def test_a_bad_row_of_a_json_array_does_not_hide_the_next(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text('[{"text": "a"},\n{"text": NaN},\n{"text": 1},\n{"text": "b"}]', encoding="utf-8")
    assert "2 errors" in refusal(tmp_path, "d.json")


def test_csv_with_quotes_commas_and_lines_in_fields(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(b'\xef\xbb\xbfprompt,completion\r\n"a, ""b""","c\r\nd"\r\ne,f\r\n')
    found = samples(tmp_path, "d.csv")
    assert [(s.line, s.prompt, s.completion) for s in found] == [(2, 'a, "b"', "c\r\nd"), (4, "e", "f")]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1)] * 2),
        min_size=1,
        max_size=6,
    )
)
def test_csv_reads_what_a_writer_wrote(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.mktemp("csv") / "d.csv"
    out = io.StringIO()
    csv.writer(out).writerows([("prompt", "completion"), *rows])
    path.write_bytes(out.getvalue().encode())
    found = [row for _, row in tables.read_csv(path, [], lambda row: False)]
    assert found == [{"prompt": a, "completion": b} for a, b in rows]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"text,text\na,b\n", ["d.csv:1", "names 'text' twice"]),
        (b"text,label\na\n", ["d.csv:2", "has 1 fields, the header 2"]),
        (b"text,label\na,b,c\n", ["d.csv:2", "has 3 fields, the header 2"]),
        (b'text,label\na,b\n"open,b\nc,d\n', ["d.csv:3", "never closes"]),
        (b"text,note\na,b\ncaf\xe9,b\nc,d\n", ["d.csv:3", "UTF-8"]),
        (b"text,label\na\0,b\n", ["d.csv:2", "NUL"]),
        (b"text\n", ["d.csv", "no rows"]),
        (b"a;b\n1;2\n", ["d.csv:2", "columns a, b"]),
        (b"Hello\nWorld\n", ["d.csv:2", "no known format", "numbers where there is no header"]),
    ],
)
def test_csv_faults(tmp_path: Path, content: bytes, parts: list[str]) -> None:
    (tmp_path / "d.csv").write_bytes(content)
    said = refusal(tmp_path, "d.csv")
    assert all(part in said for part in parts), said


def test_tables_without_a_header_have_numbered_columns(tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_text("ham\thello\nspam\twin\n", encoding="utf-8")
    found = samples(tmp_path, "d.tsv", columns={"prompt": "2", "completion": "1"})
    assert [(s.line, s.prompt, s.completion) for s in found] == [(1, "hello", "ham"), (2, "win", "spam")]


def test_tsv_quotes(tmp_path: Path) -> None:
    """Quotes of the text stay; those that a csv writer added for a quote inside go."""
    lines = ["prompt\tcompletion", '"hi"\ta "b" c', '"He said ""hi"""\tx', '"\ty"', 'it"s\tz']
    (tmp_path / "d.tsv").write_text("\n".join(lines), encoding="utf-8")
    found = samples(tmp_path, "d.tsv")
    expected = [('"hi"', 'a "b" c'), ('He said "hi"', "x"), ('"', 'y"'), ('it"s', "z")]
    assert [(s.prompt, s.completion) for s in found] == expected
    (tmp_path / "all.tsv").write_text('"prompt"\t"completion"\n"a"\t"b"\n', encoding="utf-8")
    found = samples(tmp_path, "all.tsv")
    assert [(s.prompt, s.completion) for s in found] == [("a", "b")]
    (tmp_path / "torn.tsv").write_text("prompt\tcompletion\na\tb\tc\n", encoding="utf-8")
    assert "torn.tsv:2" in refusal(tmp_path, "torn.tsv")


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    found = samples(tmp_path, "d.parquet")
    assert [sample.line for sample in found] == [1, 2]
    assert found[0].messages is not None and found[1].messages is not None
    assert found[0].messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert found[1].messages[1] == {"role": "assistant", "content": "a"}  # no null tool_calls, which Arrow adds


def test_parquet_faults(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "d.parquet").write_bytes(b"PAR1 not really")
    assert "cannot be read as parquet" in refusal(tmp_path, "d.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "n.parquet")
    assert "n.parquet:1" in refusal(tmp_path, "n.parquet") and "expected string" in refusal(tmp_path, "n.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "e.parquet")
    assert "no rows" in refusal(tmp_path, "e.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 500] * 900}), tmp_path / "t.parquet")
    content = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(content[:-20])
    assert "cannot be read as parquet" in refusal(tmp_path, "t.parquet")


def test_txt_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\r\n")
    (tmp_path / "b.txt").write_bytes(b"one\ntwo\n\nthree")
    assert texts(samples(tmp_path, "a.txt")) == texts(samples(tmp_path, "b.txt")) == [(1, "one\ntwo\n\nthree")]
    (tmp_path / "c.txt").write_bytes(b"one\ncaf\xe9\n")
    assert "c.txt:2" in refusal(tmp_path, "c.txt")
    (tmp_path / "d.txt").write_bytes(b" \n\n")
    assert "no rows" in refusal(tmp_path, "d.txt")


def test_long_txt_is_cut_behind_paragraphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "TEXT_STRETCH_CHARACTERS", 8)
    (tmp_path / "a.txt").write_text("first\n\nsecond\n\nthird\n\n" + "x\n" * 20, encoding="utf-8")
    found = samples(tmp_path, "a.txt")
    assert texts(found)[:2] == [(1, "first\n\nsecond\n"), (5, "third\n\nx\nx\nx\nx\nx")]
    whole = "".join((sample.text or "") + "\n" for sample in found)
    assert whole.replace("\n", "") == "firstsecondthird" + "x" * 20


def test_reading_again_gives_the_same(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    found = read_sources([SourceSection(path="d.jsonl")], tmp_path, BadRowsSection(), Silent())
    assert list(found) == list(found)
