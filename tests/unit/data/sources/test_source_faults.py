"""Bad inputs and what users are owed: exit code, file:line, the cause, nothing heavy imported before it is said."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from lorafit.contracts import Silent
from lorafit.data.prepare import Prepared
from lorafit.data.sources.sample_set import read_sources
from lorafit.errors import LorafitError
from lorafit.kinds.formats import formats
from lorafit.recipe.schema import BadRowsSection, SourceSection

GOOD = '{"text": "good"}\n'


def failure(folder: Path, name: str = "d.jsonl", **section: object) -> LorafitError:
    """What reading the source raises."""
    with pytest.raises(LorafitError) as caught:
        list(read_sources([SourceSection(path=name, **section)], folder, BadRowsSection(), Silent()))
    return caught.value


def nested(depth: int) -> bytes:
    return b'{"text": ' + b"[" * depth + b"]" * depth + b"}\n"


FAULTS = {
    "empty file": (b"", ["d.jsonl", "no rows"]),
    "blank lines only": (b"\n \n\r\n", ["d.jsonl", "no rows"]),
    "malformed in the middle": (GOOD.encode() * 16 + b"{oops}\n" + GOOD.encode(), ["d.jsonl:17", "invalid JSON"]),
    "truncated last line": (GOOD.encode() * 3 + b'{"text": "cut he', ["d.jsonl:4", "truncated or invalid JSON"]),
    "cut inside a key": (GOOD.encode() + b'{"te', ["d.jsonl:2", "truncated or invalid JSON"]),
    "key typo in one row": (
        GOOD.encode() + b'{"txet": "x"}\n',
        ["d.jsonl:2", "missing", "text", "txet", "did you mean"],
    ),
    "key typo in the first row": (b'{"txet": "x"}\n' + GOOD.encode(), ["d.jsonl:1", "missing", "text", "txet"]),
    "key typo in the only row": (b'{"txet": "x"}\n', ["d.jsonl:1", "missing", "text", "did you mean 'txet'"]),
    "another type": (b'{"text": 1}\n{"text": "x"}\n', ["d.jsonl:1", "text", "expected string", "integer 1"]),
    "null": (b'{"text": null}\n', ["d.jsonl:1", "text", "expected string", "null"]),
    "boolean": (GOOD.encode() + b'{"text": true}\n', ["d.jsonl:2", "expected string", "boolean"]),
    "list of strings": (GOOD.encode() + b'{"text": ["x"]}\n', ["d.jsonl:2", "expected string", "list"]),
    "empty text": (GOOD.encode() + b'{"text": "  "}\n', ["d.jsonl:2", "text", "is empty"]),
    "empty row": (GOOD.encode() + b"{}\n", ["d.jsonl:2", "empty row"]),
    "row is a list": (GOOD.encode() + b'["text"]\n', ["d.jsonl:2", "expected an object", "list"]),
    "row is a number": (GOOD.encode() + b"17\n", ["d.jsonl:2", "expected an object", "integer 17"]),
    "two rows on a line": (GOOD.encode() + b'{"text": "a"}{"text": "b"}\n', ["d.jsonl:2", "extra data"]),
    "duplicate key": (b'{"text": "a", "text": "b"}\n', ["d.jsonl:1", "duplicate key", "text"]),
    "duplicate key further in": (b'{"text": "a", "x": {"k": 1, "k": 1}}\n', ["d.jsonl:1", "duplicate key 'k'"]),
    "NaN": (b'{"text": NaN}\n', ["d.jsonl:1", "NaN"]),
    "Infinity": (b'{"text": -Infinity}\n', ["d.jsonl:1", "Infinity"]),
    "a number that overflows": (b'{"text": "a", "x": 1e999}\n', ["d.jsonl:1", "Infinity"]),
    "a number of 5000 digits": (b'{"text": "a", "x": ' + b"9" * 5000 + b"}\n", ["d.jsonl:1", "too many digits"]),
    "lone surrogate": (b'{"text": "\\ud800"}\n', ["d.jsonl:1", "surrogate"]),
    "lone low surrogate in a key": (b'{"text": "a", "\\udc00": 1}\n', ["d.jsonl:1", "surrogate"]),
    "invalid UTF-8": (GOOD.encode() + b'{"text": "caf\xe9"}\n', ["d.jsonl:2", "UTF-8", "0xE9"]),
    "NULs": (GOOD.encode() + b"\0\0\0\0\n", ["d.jsonl:2", "NUL"]),
    "NULs without a line end": (GOOD.encode() + b"\0\0\0\0", ["d.jsonl:2", "NUL"]),
    "UTF-16": (GOOD.encode("utf-16"), ["d.jsonl", "UTF-8"]),
    "UTF-16 without a mark": (GOOD.encode("utf-16-le"), ["d.jsonl", "UTF-8"]),
    "UTF-16 big endian": (GOOD.encode("utf-16-be"), ["d.jsonl", "UTF-8"]),
    "UTF-32": (GOOD.encode("utf-32"), ["d.jsonl", "UTF-8"]),
    "nested 101 deep": (nested(101), ["d.jsonl:1", "nested deeper"]),
    "nested 3000 deep": (nested(3000), ["d.jsonl:1", "nested deeper"]),
    "nested 200000 deep": (nested(200_000), ["d.jsonl:1", "nested deeper"]),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n", ["git-lfs pointer"]),
    "gzip": (b"\x1f\x8b\x08\0abcdef", ["d.jsonl", "packed"]),
    "a web page": (b"<!DOCTYPE html>\n<html></html>\n", ["d.jsonl", "web page"]),
    "a JSON array": (b'[\n{"text": "a"}\n]\n', ["d.jsonl:1", "JSON array", ".json"]),
    "no known columns": (b'{"left": "a", "right": "b"}\n', ["d.jsonl:1", "left, right", "columns"]),
    "two formats": (
        GOOD.encode() + b'{"question": "a", "answer": "b"}\n',
        ["text (line 1)", "question_answer (line 2)"],
    ),
    "no messages": (b'{"messages": []}\n', ["d.jsonl:1", "messages", "assistant"]),
    "a carriage return line": (b'{"text": "a"}\r{"text": "b"}\r', ["d.jsonl:1", "extra data"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named(tmp_path: Path, fault: str) -> None:
    content, parts = FAULTS[fault]
    (tmp_path / "d.jsonl").write_bytes(content)
    error = failure(tmp_path)
    assert error.exit_code == 4
    for part in parts:
        assert part in str(error)
    assert len(f"error: {error.one_line}") <= 300


def test_all_bad_rows_are_counted_and_five_shown(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(GOOD + '{"text": 1}\n' * 9, encoding="utf-8")
    error = failure(tmp_path)
    assert "9 errors" in str(error) and "d.jsonl:2" in str(error)
    assert [str(e).split(": ")[0] for e in error.errors] == [f"d.jsonl:{line}" for line in range(2, 7)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["README.txt", "a.jsonl", "b.jsonl"], "rows/*.jsonl"),
        (["a.jsonl.gz", "b.JSONL.gz", "c.jsonl.gz", "z.csv"], "rows/*.jsonl.gz"),
        (["notes.txt", "x/a.csv", "y/b.csv"], "rows/**/*.csv"),
    ],
)
def test_a_folder_is_told_with_the_pattern_of_most_of_its_files(tmp_path: Path, names: list[str], pattern: str) -> None:
    for name in names:
        (tmp_path / "rows" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rows" / name).write_text(GOOD, encoding="utf-8")
    error = str(failure(tmp_path, "rows"))
    assert "is a folder" in error and error.endswith(f"or a pattern, {pattern}")


def test_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(GOOD, encoding="utf-8")
    error = failure(tmp_path, "trian.jsonl")
    assert (error.exit_code, error.file) == (4, "trian.jsonl")
    assert "no such file" in str(error) and "did you mean train.jsonl" in str(error)
    assert "no folder" in str(failure(tmp_path, "nowhere/train.jsonl"))


def test_all_missing_files_are_named(tmp_path: Path) -> None:
    sections = [SourceSection(path="a.jsonl"), SourceSection(path="b.csv")]
    with pytest.raises(LorafitError, match="2 errors"):
        read_sources(sections, tmp_path, BadRowsSection(), Silent())


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("d.md", b"# text\n", "'.md' are not read"),
        ("d", b"text\n", "'' are not read"),
        ("d.xls", b"\xd0\xcf\x11\xe0", "save it as .xlsx or as CSV UTF-8"),
        ("d.jsonl.zst", b"\x28\xb5\x2f\xfd", "packed (zstd)"),
        ("d.zip", b"PK\x03\x04", "packed (zip)"),
    ],
)
def test_unknown_type(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert what in str(failure(tmp_path, name))


def test_a_loading_script_is_not_executed(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "d.py").write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')\n", encoding="utf-8")
    (folder / "d.jsonl").write_text(GOOD, encoding="utf-8")
    for name in ("d", "d/", "./d", "d/d.py", str(folder)):
        error = failure(tmp_path, name)
        assert error.exit_code == 8
        assert "d.py" in str(error) and "not executed" in str(error)
    assert not (tmp_path / "PWNED").exists()


def test_a_script_beside_the_rows_of_a_folder_is_told_with_their_names(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "gen.py").write_text("raise SystemExit\n", encoding="utf-8")
    (tmp_path / "rows" / "a.jsonl").write_text(GOOD, encoding="utf-8")
    error = failure(tmp_path, "rows")
    assert error.exit_code == 4 and "is a folder, and its script gen.py was not executed" in str(error)
    assert "name the files, a.jsonl, or a pattern, rows/*.jsonl" in str(error)


def test_a_folder_names_the_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text(GOOD, encoding="utf-8")
    error = failure(tmp_path, "d")
    assert error.exit_code == 4 and "train.jsonl, or a pattern, d/*.jsonl" in str(error)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "d.jsonl")
    assert "regular file" in str(failure(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(GOOD, encoding="utf-8")
    (tmp_path / "d.jsonl").chmod(0)
    assert "permission denied" in str(failure(tmp_path))


def test_a_link_to_nowhere_and_a_name_too_long(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").symlink_to("gone.jsonl")
    assert "no such file" in str(failure(tmp_path))
    assert "too long" in str(failure(tmp_path, "x" * 300 + ".jsonl"))


def test_long_line_in_bounded_memory(tmp_path: Path) -> None:
    """Ten lines of 50 MB: the error comes while one buffer of the limit's size is held."""
    with (tmp_path / "d.jsonl").open("wb") as file:
        for _ in range(2):
            file.write(b'{"text": "')
            for _ in range(50):
                file.write(b"x" * (1 << 20))
            file.write(b'"}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = failure(tmp_path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert "d.jsonl:1" in str(error) and "longer than 16 MiB" in str(error)
    assert "2 errors" in str(error)  # reading went on behind the first
    assert grown < 48 << 10  # KiB


LABELLED = {"text": "a", "label": "x", "id": "1"}


@pytest.mark.parametrize(
    ("others", "odd", "missing"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a"}, "rejected"),
        ({"question": "q", "answer": "a"}, {"question": "q"}, "answer"),
        (LABELLED, {"label": "x", "id": "1"}, "text"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 150])
def test_a_row_without_what_others_have_is_that_rows_fault(
    tmp_path: Path, others: dict[str, str], odd: dict[str, str], missing: str, place: int
) -> None:
    """Nobody is sent to correct columns that fit all other rows: what is advised then is to leave the row out."""
    write_rows(tmp_path, others, odd, place)
    for columns in ({}, {missing: missing}):
        error = failure(tmp_path, columns=columns)
        assert (error.line, error.key, error.todo) == (place + 1, missing, None) and "missing" in error.what
    odd = {**odd, f"{missing}x": "typo"}
    write_rows(tmp_path, others, odd, place)
    assert failure(tmp_path).todo == f"other rows have it; did you mean '{missing}x'? rename it"


def write_rows(folder: Path, others: dict[str, str], odd: dict[str, str], place: int) -> None:
    rows = [odd if number == place else others for number in range(151)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_row_that_alone_would_be_of_another_format_lacks_a_column(
    tmp_path: Path, prepare_rows: Callable[..., Prepared]
) -> None:
    """Of texts with labels one without a label is no reason to split the file."""
    write_rows(tmp_path, LABELLED, {"text": "b"}, 7)
    with pytest.raises(LorafitError) as caught:
        prepare_rows(train="d.jsonl")
    assert str(caught.value) == (
        "d.jsonl:8: label: missing field 'label' of text_label, which other rows have; alone it looks like text; "
        "correct the row, or set format: text_label, and bad_rows: {policy: skip} to leave it out"
    )
    write_rows(tmp_path, {"question": "q", "answer": "a"}, {"question": "b"}, 7)
    with pytest.raises(LorafitError) as caught:
        prepare_rows(train="d.jsonl")
    assert str(caught.value).endswith("correct such rows, or leave them out with data.bad_rows: {policy: skip}")


@pytest.mark.parametrize(
    ("bad", "advice"),
    [
        (5, "correct such rows, or leave them out with data.bad_rows: {policy: skip}"),
        (12, "correct such rows, or leave them out with data.bad_rows: {policy: skip, max_fraction: 0.12}"),
        (100, "correct such rows"),
    ],
)
def test_bad_rows_are_to_be_left_out_only_where_that_leaves_enough(
    tmp_path: Path, prepare_rows: Callable[..., Prepared], bad: int, advice: str
) -> None:
    rows = [{"question": "q", "answer": "" if number < bad else f"{number}"} for number in range(100)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(LorafitError) as caught:
        prepare_rows(train="d.jsonl")
    assert caught.value.one_line.endswith(f"; {advice}")


def test_skipped_rows_have_a_limit(tmp_path: Path, prepare_rows: Callable[..., Prepared]) -> None:
    rows = [GOOD.replace("good", f"good {n}") if n % 10 else "{oops}\n" for n in range(100)]
    (tmp_path / "d.jsonl").write_text("".join(rows), encoding="utf-8")
    with pytest.raises(LorafitError) as caught:
        prepare_rows(train="d.jsonl", bad_rows={"policy": "skip", "max_fraction": 0.05})
    assert caught.value.exit_code == 4
    assert "10 of 100" in str(caught.value) and "limit" in str(caught.value)
    prepared = prepare_rows(train="d.jsonl", bad_rows={"policy": "skip", "max_fraction": 0.1})
    assert len(prepared.train) == 90
    counts = prepared.report.splits["train"].sources[0]
    assert (counts.read, counts.kept, counts.bad) == (100, 90, 10)
    notes = prepared.report.splits["train"].notes
    assert [(note.file, note.line) for note in notes[:2]] == [("d.jsonl", 1), ("d.jsonl", 11)]


def test_mark_line_ends_and_last_line_do_not_matter(tmp_path: Path, prepare_rows: Callable[..., Prepared]) -> None:
    plain = GOOD + '{"text": "better"}\n'
    variants = {
        "plain": plain.encode(),
        "bom": b"\xef\xbb\xbf" + plain.encode(),
        "crlf": plain.replace("\n", "\r\n").encode(),
        "no last line end": plain.rstrip("\n").encode(),
        "blank lines": plain.replace("\n", "\n\n").encode(),
    }
    digests = set()
    for name, content in variants.items():
        (tmp_path / f"{name}.jsonl").write_bytes(content)
        digests.add(prepare_rows(train=f"{name}.jsonl").digest)
    assert len(digests) == 1


def test_faults_are_found_without_heavy_imports(tmp_path: Path) -> None:
    """A missing file and a bad row are errors before torch, transformers, datasets or numpy are imported."""
    (tmp_path / "d.jsonl").write_text(GOOD + "{oops}\n", encoding="utf-8")
    code = """
        import sys
        from pathlib import Path
        from lorafit.contracts import Silent
        from lorafit.data.sources.sample_set import read_sources
        from lorafit.errors import DataError
        from lorafit.recipe.schema import BadRowsSection, SourceSection
        for name in ("gone.jsonl", "d.jsonl"):
            try:
                list(read_sources([SourceSection(path=name)], Path(sys.argv[1]), BadRowsSection(), Silent()))
            except DataError as error:
                print(error.one_line)
        heavy = {"torch", "transformers", "datasets", "numpy", "pyarrow", "peft"} & set(sys.modules)
        print("heavy:", sorted(heavy))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "gone.jsonl: no such file" in lines[0] and "d.jsonl:2" in lines[1]
    assert lines[2] == "heavy: []"


def test_columns_are_checked_against_the_formats(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"a": "x", "b": "y"}\n', encoding="utf-8")
    error = failure(tmp_path, columns={"promt": "a"})
    assert error.exit_code == 3 and "did you mean prompt" in str(error)
    error = failure(tmp_path, columns={"prompt": "a", "completion": "c"}, format="prompt_completion")
    assert "missing column 'c'" in str(error) and "d.jsonl:1" in str(error)
    samples = list(
        read_sources(
            [SourceSection(path="d.jsonl", columns={"prompt": "a", "completion": "b"})],
            tmp_path,
            BadRowsSection(),
            Silent(),
        )
    )
    assert (samples[0].prompt, samples[0].completion) == ("x", "y")


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        (
            {"id": 1, "label": "x", "message": "m"},
            {"text": "massage"},
            "'massage' is not a column of the rows; there are id, label, message; did you mean 'message'?",
        ),
        (
            {"id": 1, "translation": {"en": "a", "de": "b"}},
            {"source": "translation.en", "target": "translation.fr"},
            "'translation.fr' is not a column of the rows; there are id, translation.en, translation.de; did you mean",
        ),
        (
            {"id": 1, "kind": "x"},
            {"prompt": "asked", "completion": "reply"},
            "'asked' and 'reply' are not columns of the rows; there are id, kind; correct columns in the recipe",
        ),
    ],
)
def test_a_mapped_column_that_no_row_has_is_said_before_formats_are_guessed(
    tmp_path: Path, row: dict[str, object], columns: dict[str, str], said: str
) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    error = str(failure(tmp_path, columns=columns))
    assert error.startswith(f"d.jsonl:1: columns: {said}") and "mean 'translation.en'" not in error


def test_a_mapped_name_that_was_taken_gives_way(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "old", "new": "p", "completion": "c"}\n', encoding="utf-8")
    section = SourceSection(path="d.jsonl", columns={"prompt": "new"})
    samples = list(read_sources([section], tmp_path, BadRowsSection(), Silent()))
    assert samples[0].prompt == "p"


def test_a_column_that_looks_like_a_field_is_warned_about(tmp_path: Path) -> None:
    row = {"instruction": "a", "output": "b", "inputs": "c", "id": 1}
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    reporter = Silent()
    list(read_sources([SourceSection(path="d.jsonl")], tmp_path, BadRowsSection(), reporter))
    assert len(reporter.warnings) == 1
    assert "'inputs'" in reporter.warnings[0] and "did you mean 'input'" in reporter.warnings[0]


def test_limit_reads_no_further(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(GOOD * 2 + "{oops}\n", encoding="utf-8")
    samples = list(read_sources([SourceSection(path="d.jsonl", limit=2)], tmp_path, BadRowsSection(), Silent()))
    assert len(samples) == 2


def test_a_path_into_a_local_folder_is_no_hub_id(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(GOOD, encoding="utf-8")
    assert "no such file; did you mean train.jsonl" in str(failure(tmp_path, "data/train"))


def test_offline_hub_is_one_clear_sentence(tmp_path: Path) -> None:
    """Really tried, in a process without network settings: no data set of this name is cached anywhere here."""
    code = """
        import sys
        from pathlib import Path
        from lorafit.contracts import Silent
        from lorafit.data.sources.sample_set import read_sources
        from lorafit.recipe.schema import BadRowsSection, SourceSection
        try:
            list(read_sources([SourceSection(path="nobody/nothing")], Path(sys.argv[1]), BadRowsSection(), Silent()))
        except Exception as error:
            print(type(error).__name__, error)
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.stdout.startswith("DataError nobody/nothing: no such file, and HF_HUB_OFFLINE keeps"), done


def test_formats_have_distinct_priorities() -> None:
    priorities = [kind.priority for _, kind in formats.items()]
    assert len(set(priorities)) == len(priorities)
