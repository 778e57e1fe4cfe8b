"""`preview --rows N` of many rows prepares the first of them, says so, and leaves the cache of a training as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafit.data.prepare import Prepared
from lorafit.errors import LorafitError
from tests.support.tiny_data import Listener, chat, write_jsonl

Prepare = Callable[..., Prepared]
ROWS, LOOKED_AT = 600, 256


def lines_of(prepared: Prepared) -> list[tuple[str, int, list[int]]]:
    rows = [prepared.train[number] for number in range(len(prepared.train))]
    return [(row.file, row.line, list(map(int, row["tokens"]))) for row in rows]


def many(start: int = 0) -> list[Any]:
    return [chat(f"ask {number}?", f"say {number}.") for number in range(start, start + ROWS)]


def test_the_first_rows_are_prepared_and_said_to_be_a_part(
    tmp_path: Path, prepare_rows: Prepare, listener: Listener
) -> None:
    write_jsonl(tmp_path / "d.jsonl", many())
    some = prepare_rows(train="d.jsonl", glance=1)
    part = some.report.splits["train"]
    assert (part.rows, part.of_rows, part.sources[0].read) == (LOOKED_AT, ROWS, LOOKED_AT)
    said = some.report.warnings[0]
    assert "only the first 256 rows of about 600" in said and "without --rows" in said and "held out" not in said
    assert prepare_rows(train="d.jsonl", glance=1).digest == some.digest and "cache hit" in listener.infos[-1]

    whole = prepare_rows(train="d.jsonl")
    assert listener.infos[-1] == "train rows: cache miss: not prepared before"
    assert whole.report.splits["train"].of_rows is None and len(whole.train) == ROWS
    assert lines_of(whole)[:LOOKED_AT] == lines_of(some) and whole.digest != some.digest

    again = prepare_rows(train="d.jsonl", glance=1)  # all are there: nothing is left out
    assert again.digest == whole.digest and again.report.splits["train"].of_rows is None
    assert not any("only the first" in warning for warning in again.report.warnings)


def test_as_many_are_prepared_as_are_shown(tmp_path: Path, prepare_rows: Prepare) -> None:
    write_jsonl(tmp_path / "d.jsonl", many())
    assert len(prepare_rows(train="d.jsonl", glance=400).train) == 400
    assert len(prepare_rows(train=[{"path": "d.jsonl", "limit": 300}], glance=400).train) == 300


def test_each_source_gives_some(tmp_path: Path, prepare_rows: Prepare) -> None:
    write_jsonl(tmp_path / "a.jsonl", many())
    write_jsonl(tmp_path / "b.jsonl", many(ROWS))
    some = prepare_rows(train=["a.jsonl", "b.jsonl"], glance=2)
    assert [counts.read for counts in some.report.splits["train"].sources] == [LOOKED_AT // 2] * 2
    assert some.report.splits["train"].of_rows == 2 * ROWS


def test_nothing_is_held_out_of_a_part(tmp_path: Path, prepare_rows: Prepare) -> None:
    write_jsonl(tmp_path / "d.jsonl", many())
    some = prepare_rows(train="d.jsonl", validation={"fraction": 0.5}, glance=1)
    assert some.validation is None and len(some.train) == LOOKED_AT
    assert "draws those that are held out" in some.report.warnings[0]
    assert len(prepare_rows(train="d.jsonl", validation={"fraction": 0.5}).train) == ROWS // 2


def test_few_rows_are_all_counted(tmp_path: Path, prepare_rows: Prepare) -> None:
    write_jsonl(tmp_path / "d.jsonl", many()[: 2 * LOOKED_AT])
    some = prepare_rows(train="d.jsonl", glance=1)
    assert len(some.train) == 2 * LOOKED_AT and some.report.splits["train"].of_rows is None


def test_what_is_wrong_is_told_of_all_rows(tmp_path: Path, prepare_rows: Prepare) -> None:
    rows = many()
    for place in (3, 5, ROWS - 1):
        rows[place] = {"messages": []}
    write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(LorafitError, match=r"3 errors; first: d\.jsonl:4"):
        prepare_rows(train="d.jsonl", glance=1)
    write_jsonl(tmp_path / "e.jsonl", [chat("long " * 90, "x")] * LOOKED_AT + many())
    some = prepare_rows(train="e.jsonl", max_length=64, overlength="drop", glance=1)
    assert len(some.train) == ROWS and some.report.splits["train"].of_rows is None  # the first ones say nothing
