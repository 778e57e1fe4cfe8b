"""Sources beyond plain files of lines: .gz, Excel, semicolons, patterns; and what is bounded whatever a file holds."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafit.contracts import Sample, Silent
from lorafit.data.prepare import Prepared
from lorafit.data.sources import files, json_file
from lorafit.data.sources.sample_set import read_sources
from lorafit.errors import LorafitError
from lorafit.recipe.schema import BadRowsSection, SourceSection

MIB = 1 << 20
QUESTIONS = [{"question": "Was kostet das?", "answer": "12,50 €; inkl. MwSt"}, {"question": "x", "answer": "y"}]


def samples(folder: Path, name: str, reporter: Silent | None = None, **section: Any) -> list[Sample]:
    return list(read_sources([SourceSection(path=name, **section)], folder, BadRowsSection(), reporter or Silent()))


def refusal(folder: Path, name: str, **section: Any) -> str:
    with pytest.raises(LorafitError) as caught:
        samples(folder, name, **section)
    assert caught.value.exit_code == 4
    assert len(f"error: {caught.value.one_line}") <= 300
    return str(caught.value)


def pairs(found: list[Sample]) -> list[tuple[int, str, str]]:
    return [(s.line, s.turns[0]["content"], s.turns[1]["content"]) for s in found]


# --- gzip -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["d.jsonl", "d.ndjson", "d.json", "d.csv", "d.tsv", "d.txt", "LARGE.JSONL"])
def test_a_packed_file_has_the_rows_of_the_file(tmp_path: Path, name: str) -> None:
    rows = [{"question": f"q {n}", "answer": f"a {n}"} for n in range(300)]
    separator = "\t" if name.endswith("tsv") else ","
    content = {
        "json": json.dumps(rows, indent=1),
        "csv": separator.join(rows[0]) + "\n" + "".join(f"{separator.join(row.values())}\n" for row in rows),
        "txt": "one text\n\nof some lines\n" * 50,
    }
    content["tsv"] = content["csv"]
    text = content.get(name.split(".")[1], "".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / name).write_text(text, encoding="utf-8")
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(text[:99].encode()) + gzip.compress(text[99:].encode()))  # two members
    plain, unpacked = samples(tmp_path, name), samples(tmp_path, packed.name)
    assert len(plain) == (1 if name == "d.txt" else 300)
    assert [(s.line, s.messages, s.text) for s in unpacked] == [(s.line, s.messages, s.text) for s in plain]


@pytest.mark.parametrize(("name", "total"), [("d.jsonl", 60), ("d.jsonl.gz", None), ("d.csv", 60)])
def test_a_bar_has_a_total_only_where_rows_can_be_counted(tmp_path: Path, name: str, total: int | None) -> None:
    """The size of a packed file or of a workbook says nothing of its rows. A table's header is no row, and a last line
    needs no newline.
    """
    content = "".join(json.dumps({"question": "what?" * 9, "answer": f"{n}"}) + "\n" for n in range(60)).encode()
    if name.endswith("csv"):
        content = "".join(["question,answer\n", *(f"what?,{n}\n" for n in range(60))]).encode()
    for written in (content, content.removesuffix(b"\n")):
        (tmp_path / name).write_bytes(gzip.compress(written) if name.endswith("gz") else written)
        sources = read_sources([SourceSection(path=name)], tmp_path, BadRowsSection(), Silent())
        assert sources.count_for_bar() == total


def test_a_packed_file_without_a_type_holds_an_object_a_line(tmp_path: Path) -> None:
    for name in ("rows.gz", "rows.data", "rows"):
        content = "".join(json.dumps(row) + "\n" for row in QUESTIONS).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        assert [s.line for s in samples(tmp_path, f"./{name}")] == [1, 2]
    (tmp_path / "notes.gz").write_bytes(gzip.compress(b"# Notes\n"))
    assert "files of type '' are not read" in refusal(tmp_path, "notes.gz")


def test_packed_faults(tmp_path: Path) -> None:
    content = "".join(json.dumps({"text": os.urandom(40).hex()}) + "\n" for _ in range(50_000)).encode()
    packed = gzip.compress(content, 1)
    (tmp_path / "torn.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    said = refusal(tmp_path, "torn.jsonl.gz")
    assert "torn.jsonl.gz" in said and "ends early" in said
    damaged = bytearray(packed)
    damaged[len(packed) // 2 : len(packed) // 2 + 50] = bytes(50)
    (tmp_path / "bad.jsonl.gz").write_bytes(damaged)
    assert "is damaged" in refusal(tmp_path, "bad.jsonl.gz")
    (tmp_path / "plain.jsonl.gz").write_bytes(b'{"text": "a"}\n')
    assert "not packed with gzip" in refusal(tmp_path, "plain.jsonl.gz")
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    assert "no rows" in refusal(tmp_path, "empty.jsonl.gz")
    (tmp_path / "d.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    assert "packed by itself" in refusal(tmp_path, "d.parquet.gz")
    (tmp_path / "bad.csv.gz").write_bytes(gzip.compress(b"question,answer\na\nb,c\n"))
    assert "bad.csv.gz:2" in refusal(tmp_path, "bad.csv.gz")


READ = """
    import resource, sys
    from pathlib import Path
    from lorafit.contracts import Silent
    from lorafit.data.sources.sample_set import read_sources
    from lorafit.errors import LorafitError
    from lorafit.recipe.schema import BadRowsSection, SourceSection
    import pyarrow.parquet
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    before = peak()
    for name in sys.argv[2:]:
        try:
            list(read_sources([SourceSection(path=name)], Path(sys.argv[1]), BadRowsSection(), Silent()))
        except LorafitError as error:
            print(error.one_line)
    print(peak() - before)
"""


def test_bombs_are_refused_in_bounded_memory(tmp_path: Path) -> None:
    """What unpacks to gigabytes, or is one value of hundreds of megabytes, in a file of some kilobytes."""
    import pyarrow
    import pyarrow.parquet

    with gzip.open(tmp_path / "d.jsonl.gz", "wb") as file:
        row = b'{"text": "' + b"a" * (MIB // 64 - 13) + b'"}\n'
        for _ in range(100):
            file.write(row * 64)
    with (tmp_path / "d.json").open("wb") as large:
        large.write(b'[{"text": "a"},\n{"text": "')
        for _ in range(100):
            large.write(b"x" * MIB)
        large.write(b'"}]')
    shared = pyarrow.DictionaryArray.from_arrays([0] * 20, ["x" * (30 * MIB)])
    options: dict[str, Any] = {"compression": "zstd", "store_schema": False}
    pyarrow.parquet.write_table(pyarrow.table({"text": shared}), tmp_path / "d.parquet", **options)
    plain = pyarrow.table({"text": ["y" * (70 * MIB)]})
    pyarrow.parquet.write_table(plain, tmp_path / "p.parquet", use_dictionary=False, **options)
    assert sum((tmp_path / name).stat().st_size for name in ("d.parquet", "p.parquet")) < MIB // 10
    wanted = {
        "d.jsonl.gz": "unpacks to more than 250 times",
        "d.json": "d.json:2: longer than 16 MiB",
        "d.parquet": "20 errors; first: d.parquet:1: longer than 16 MiB",
        "p.parquet": "column text unpacks from",
    }
    command = [sys.executable, "-c", textwrap.dedent(READ), str(tmp_path), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *said, grown_mib = done.stdout.splitlines()
    for part, line in zip(wanted.values(), said, strict=True):
        assert part in line, line
    assert int(grown_mib) < 300


def test_parquet_with_values_of_a_dictionary_is_read_whole(tmp_path: Path) -> None:
    """Categories, as pandas writes them: all of a column's values together are no row's."""
    import pyarrow
    import pyarrow.parquet

    texts = [f"{number} " + "x" * (2 * MIB) for number in range(12)]
    rows = pyarrow.table({"text": pyarrow.array(texts * 2).dictionary_encode()})
    pyarrow.parquet.write_table(rows, tmp_path / "d.parquet", row_group_size=20)
    found = samples(tmp_path, "d.parquet")
    assert [sample.text for sample in found] == texts * 2
    assert [sample.line for sample in found] == list(range(1, 25))


# --- json, which is read whole ----------------------------------------------------------------------------------------


@pytest.fixture
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of at most 64 bytes instead of 16 MiB."""
    monkeypatch.setattr(json_file, "LINE_LIMIT_BYTES", 64)


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("wrap", [None, "data", "é"])
def test_json_is_read_with_the_lines_of_its_rows(tmp_path: Path, indent: int | None, wrap: str | None) -> None:
    rows = [{"text": f'{n} é\u2028 {"😀" * (n % 7)} \\ " ]}}'} for n in range(200)]
    value = rows if wrap is None else {"version": [1, 2], "n": {"a": None}, wrap: rows, "last": []}
    text = " \n" + json.dumps(value, indent=indent, ensure_ascii=False) + "\n" * 100
    (tmp_path / "d.json").write_text(text, encoding="utf-8")
    found = samples(tmp_path, "d.json")
    assert [s.text for s in found] == [row["text"] for row in rows]
    lines = text.split("\n")
    for sample, row in zip(found, rows, strict=True):
        here = lines[sample.line - 1 : sample.line + 2]
        assert json.dumps(row["text"], ensure_ascii=False) in "\n".join(here)


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('[{"text": "%s"}]' % ("x" * 500), "d.json:1: longer than"),
        ('[{"text": "a"},\n {"text": "b"}' + " " * 300, "d.json:2: truncated or invalid JSON: expected ,"),
        ('[{"text": "a"},\n {"text": nope}%s]' % (" " * 300), "d.json:2:11: invalid JSON: expecting value"),
        ('[{"text": "a"}%s]\n[{"text": "b"}]' % (" " * 300), "d.json:2:1: invalid JSON: extra data"),
        ('{"data": [{"text": "a"}%s], "data": []}' % (" " * 300), "duplicate key 'data'"),
        ('{"a": 1 %s "data": []}' % ("\n" * 300), "d.json:301:2: invalid JSON: expected ,"),
    ],
)
def test_json_faults_have_their_place(tmp_path: Path, content: str, part: str) -> None:
    (tmp_path / "d.json").write_text(content, encoding="utf-8")
    assert part in refusal(tmp_path, "d.json")


def test_a_large_json_file_is_to_be_written_as_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "FILE_LIMIT_BYTES", 1 << 20)
    (tmp_path / "d.json").write_text("[" + '{"text": "a"}, ' * 70_000 + '{"text": "b"}]', encoding="utf-8")
    assert "larger than 1 MiB, and a .json file is read whole; write it as jsonl" in refusal(tmp_path, "d.json")


# --- what separates fields --------------------------------------------------------------------------------------------


def write_table(
    path: Path, separator: str, header: list[str], rows: list[list[str]], encoding: str = "utf-8-sig"
) -> None:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, lineterminator="\r\n")
    writer.writerows([header, *rows])
    path.write_bytes(out.getvalue().encode(encoding))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_found(tmp_path: Path, separator: str) -> None:
    rows = [list(row.values()) for row in QUESTIONS]
    write_table(tmp_path / "d.csv", separator, ["question", "answer"], rows)
    assert pairs(samples(tmp_path, "d.csv")) == [(2, "Was kostet das?", "12,50 €; inkl. MwSt"), (3, "x", "y")]
    wide = [["1", *row, "", "03.11.2025"] for row in rows] + [["", "", "", "", ""]]
    write_table(tmp_path / "w.csv", separator, ["Nr", "Frage", "Antwort", "leer", "zuletzt geändert"], wide)
    columns = {"question": "Frage", "answer": "Antwort"}
    assert pairs(samples(tmp_path, "w.csv", columns=columns)) == pairs(samples(tmp_path, "d.csv"))
    write_table(tmp_path / "n.csv", separator, rows[0], rows[1:])
    by_number = samples(tmp_path, "n.csv", columns={"question": "1", "answer": "2"})
    assert pairs(by_number) == [(1, "Was kostet das?", "12,50 €; inkl. MwSt"), (2, "x", "y")]


def test_columns_decide_what_separates(tmp_path: Path) -> None:
    """A header that each of two separators cuts into several names, and rows that both cut evenly."""
    (tmp_path / "d.csv").write_text("Frage;Stand, Quelle;Antwort\na;b, c;d\n", encoding="utf-8")
    assert "looks like a comma or a semicolon" in (said := refusal(tmp_path, "d.csv")) and "d.csv:1" in said
    found = samples(tmp_path, "d.csv", columns={"question": "Frage", "answer": "Antwort"})
    assert pairs(found) == [(2, "a", "d")]
    (tmp_path / "k.csv").write_text("question;a, b;answer\na;b, c;d\n", encoding="utf-8")
    assert pairs(samples(tmp_path, "k.csv")) == [(2, "a", "d")]  # the columns of a format decide as well
    (tmp_path / "e.csv").write_text("Nr;Was, wo\n1;a, b, c\n2;d\n", encoding="utf-8")
    assert "columns Nr, Was, wo" in refusal(tmp_path, "e.csv")  # every row has two fields between semicolons


def test_a_line_may_say_the_separator_and_one_column_has_none(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text('sep=|\nquestion|answer\n"a, b; c"|d\n', encoding="utf-8")
    assert pairs(samples(tmp_path, "s.csv")) == [(3, "a, b; c", "d")]
    (tmp_path / "t.csv").write_text("text\nOh, hello\nHi there\n", encoding="utf-8")
    assert [s.text for s in samples(tmp_path, "t.csv")] == ["Oh, hello", "Hi there"]


def test_semicolon_faults(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("question;answer\na;b;c\n", encoding="utf-8")
    said = refusal(tmp_path, "d.csv")
    assert "d.csv:2: has 3 fields, the header 2; a semicolon inside a field needs quotes" in said
    write_table(tmp_path / "w.csv", ";", ["question", "answer"], [["Öffnet ihr?", "Täglich."]], "cp1252")
    said = refusal(tmp_path, "w.csv")
    assert "w.csv:2: not valid UTF-8: byte 0xD6 at column 1" in said
    assert "in Windows-1252 it is 'Ö'" in said and "CSV UTF-8" in said


# --- Excel ------------------------------------------------------------------------------------------------------------


def write_book(path: Path, rows: list[list[Any]], **others: list[list[Any]]) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.title = "FAQ"
    for row in rows:
        book.active.append(row)
    for title, content in others.items():
        sheet = book.create_sheet(title)
        for row in content:
            sheet.append(row)
    book.save(path)


def test_a_workbooks_first_sheet_is_read(tmp_path: Path) -> None:
    day = datetime.datetime(2025, 11, 3)
    rows = [
        [],
        ["question", "answer", "n", "when"],
        ["Was kostet das?", 12.5, 0.1 + 0.2, day],
        [],
        [3, True, None, day.replace(hour=14, minute=30)],
        ["line\nbreak", day.time().replace(hour=9), 1e20, datetime.timedelta(hours=30, minutes=5)],
    ]
    write_book(tmp_path / "faq.xlsx", rows, Archiv=[["old"]], Leer=[])
    reporter = Silent()
    found = samples(tmp_path, "faq.xlsx", reporter)
    assert pairs(found) == [(3, "Was kostet das?", "12.5"), (5, "3", "TRUE"), (6, "line\nbreak", "09:00:00")]
    assert ["only the first sheet, 'FAQ', is read, not Archiv" in warning for warning in reporter.warnings] == [True]
    others = samples(tmp_path, "faq.xlsx", columns={"prompt": "n", "completion": "when"}, limit=1)
    assert (others[0].prompt, others[0].completion) == ("0.3", "2025-11-03")
    (tmp_path / "answers.csv").write_text("question,answer\nWas kostet das?,12.5\n3,TRUE\n", encoding="utf-8")
    as_csv = samples(tmp_path, "answers.csv")
    assert [s.messages for s in as_csv] == [s.messages for s in found[:2]]


def test_workbook_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_book(tmp_path / "e.xlsx", [["question", "answer"], ["a", "#N/A"], ["b", "c"]])
    assert "e.xlsx:2: cell B2 holds the error #N/A" in refusal(tmp_path, "e.xlsx")
    write_book(tmp_path / "w.xlsx", [["question", "answer"], ["a", "b", None, "far"]])
    assert "w.xlsx:2: has 4 fields, the header 2" in refusal(tmp_path, "w.xlsx")
    write_book(tmp_path / "u.xlsx", [["question", "answer"], ["a", "=1+2"]])  # no program has computed it
    assert "u.xlsx:2: answer: is empty" in refusal(tmp_path, "u.xlsx")
    write_book(tmp_path / "n.xlsx", [["question", "answer"]])
    assert "no rows" in refusal(tmp_path, "n.xlsx")
    (tmp_path / "p.xlsx").write_bytes(b"\xd0\xcf\x11\xe0" * 99)  # how Excel writes what has a password
    assert "without a password" in refusal(tmp_path, "p.xlsx")
    with zipfile.ZipFile(tmp_path / "z.xlsx", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("xl/sharedStrings.xml", b"x" * (65 * MIB))
    assert "unpacks to 65 MiB" in refusal(tmp_path, "z.xlsx")
    with zipfile.ZipFile(tmp_path / "other.xlsx", "w") as packed:
        packed.writestr("readme.txt", "no workbook")
    assert "cannot be read as an Excel workbook" in refusal(tmp_path, "other.xlsx")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    assert 'install it with: pip install "lorafit[xlsx]"' in refusal(tmp_path, "n.xlsx")


# --- patterns ---------------------------------------------------------------------------------------------------------


def test_a_pattern_is_a_source_for_each_file(tmp_path: Path, prepare_rows: Callable[..., Prepared]) -> None:
    for name in ("rows/b.jsonl", "rows/a.jsonl", "rows/deep/er/c.jsonl", "rows/.hidden.jsonl", "rows/a[1].jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        rows = [{"question": f"{name} {n}", "answer": "a"} for n in range(3)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "rows" / "folder.jsonl").mkdir()

    def places(pattern: str, **section: Any) -> list[str]:
        return [f"{s.file}:{s.line}" for s in samples(tmp_path, pattern, **section)]

    flat = ["rows/a.jsonl", "rows/a[1].jsonl", "rows/b.jsonl"]
    assert places("rows/*.jsonl", limit=1) == [f"{name}:1" for name in flat]
    assert places("rows/**/*.jsonl", limit=1) == [f"{name}:1" for name in [*flat, "rows/deep/er/c.jsonl"]]
    assert places("rows/[ab].jsonl", limit=2) == [f"rows/{name}.jsonl:{n}" for name in "ab" for n in (1, 2)]
    assert places(f"{tmp_path}/rows/?.jsonl", limit=1) == [f"{tmp_path}/rows/{name}.jsonl:1" for name in "ab"]
    assert places("rows/a[1].jsonl", limit=1) == ["rows/a[1].jsonl:1"]  # a file of that very name is no pattern
    prepared = prepare_rows(train=[{"path": "rows/[ab].jsonl", "repeats": 2}])
    report = prepared.report.splits["train"]
    assert [(counts.file, counts.kept) for counts in report.sources] == [("rows/a.jsonl", 3), ("rows/b.jsonl", 3)]
    assert prepared.facts().rows == 12
    (tmp_path / "rows" / "b.jsonl").write_text('{"question": "q"}\n', encoding="utf-8")
    assert "rows/b.jsonl:1: answer: missing field 'answer' of question_answer" in refusal(tmp_path, "rows/*.jsonl")


def test_a_pattern_without_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(tmp_path, "rows/*.jsonl").startswith("rows/*.jsonl: no file matches the pattern; ")
    monkeypatch.setattr(files, "MOST_FILES", 2)
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    assert "more than 2 files match" in refusal(tmp_path, "*.jsonl")


# --- text that is rows ------------------------------------------------------------------------------------------------


def test_a_txt_of_rows_is_read_as_rows(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    assert [s.line for s in samples(tmp_path, "d.txt")] == [1, 2]
    (tmp_path / "log.txt").write_text('{"level": "info"}\n{"level": "warning"}\n', encoding="utf-8")
    assert [s.text for s in samples(tmp_path, "log.txt")] == ['{"level": "info"}\n{"level": "warning"}']
