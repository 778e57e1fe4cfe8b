"""A bad row of any format, as any task reads it, ends as a data error does: file, line, key, exit code 4."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorafit.data.prepare import Prepared
from lorafit.errors import DataError
from lorafit.kinds.formats import formats
from lorafit.kinds.tasks import Task, tasks
from tests.support.bad_rows import BAD_ROWS, Row, Rows
from tests.support.tiny_data import write_jsonl

LINE = 3
OTHER_TYPES = (None, 7, True, {"a": "b"})


def required(name: str) -> list[str]:
    return [field for field, needed in formats.get(name).fields.items() if needed]


def bad_rows(name: str, rows: Rows) -> Iterator[tuple[str, Row, str]]:
    """What is wrong, the row, and the key of the error."""
    for field in required(name):
        rest = {key: value for key, value in rows.good.items() if key != field}
        yield f"no {field}", rest, field
        for value in OTHER_TYPES:
            if type(value) not in rows.may_be.get(field, ()):
                yield f"{field} is {value}", {**rest, field: value}, field
        if field not in rows.may_be_empty and isinstance(rows.good[field], str | list):
            yield f"{field} is empty", {**rest, field: type(rows.good[field])()}, field
    for what, (changes, key) in rows.bad.items():
        yield what, {**rows.good, **changes}, key


def learners(name: str) -> list[str]:
    """The tasks whose rows have the format; plain causal language models where no task has it alone."""
    return [kind for kind in tasks.names() if tasks.make(kind).row_format == name] or ["causal-lm"]


CASES = [
    pytest.param(name, kind, row, key, id=f"{name}-{kind}-{what}")
    for name, rows in sorted(BAD_ROWS.items())
    for kind in learners(name)
    for what, row, key in bad_rows(name, rows)
]


def make_task(name: str, kind: str) -> Task[Any]:
    known = tasks.section(kind).model_fields
    return tasks.make(kind, **{option: value for option, value in BAD_ROWS[name].task.items() if option in known})


def test_every_format_has_bad_rows_of_its_own() -> None:
    """A new format stands in tests/support/bad_rows.py."""
    assert sorted(BAD_ROWS) == formats.names()
    assert [name for name, rows in BAD_ROWS.items() if not rows.bad or rows.good.keys() < set(required(name))] == []


@pytest.mark.parametrize("name", sorted(BAD_ROWS))
def test_the_good_row_is_good(name: str, tmp_path: Path, prepare_rows: Callable[..., Prepared]) -> None:
    """Else a bad one might be refused for what is good in it."""
    rows = BAD_ROWS[name]
    write_jsonl(tmp_path / "d.jsonl", [rows.good, {**rows.good, **rows.other}])
    for kind in learners(name):
        assert len(prepare_rows(train=[{"path": "d.jsonl", "format": name}], task=make_task(name, kind)).train) == 2


@pytest.mark.parametrize("told", [True, False], ids=["named", "auto"])
@pytest.mark.parametrize(("name", "kind", "row", "key"), CASES)
def test_a_bad_row_is_named(
    name: str, kind: str, row: Row, key: str, told: bool, tmp_path: Path, prepare_rows: Callable[..., Prepared]
) -> None:
    good = BAD_ROWS[name].good
    write_jsonl(tmp_path / "d.jsonl", [good, {**good, **BAD_ROWS[name].other}, row, good])
    source = {"path": "d.jsonl", **({"format": name} if told else {})}
    with pytest.raises(DataError) as caught:
        prepare_rows(train=[source], task=make_task(name, kind))
    [error] = caught.value.errors
    assert (error.exit_code, error.file, error.line) == (4, "d.jsonl", LINE), error
    assert error.key is not None and (error.key == key or error.key.startswith(f"{key}[")), error
    assert len(f"error: {error.one_line}") <= 300
