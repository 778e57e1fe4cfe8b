"""Rows of local files, one at a time, by what the file's name says that it holds.

    .jsonl .ndjson ─┐
    .json .txt ─────┼─ also as .gz ──> lines, json_file, tables ─┐
    .csv .tsv ──────┘                                            ├──> (line, row | DataError)
    .parquet .xlsx ──────────────────> parquet, workbook ────────┘

No reader holds more than a few rows, and no row is larger than `LINE_LIMIT_BYTES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lorafit.data.sources.files import suffix_of
from lorafit.data.sources.json_file import read_json_file
from lorafit.data.sources.lines import RawRow, RawRows, first_object, read_jsonl, read_prompt_lines, read_txt
from lorafit.data.sources.parquet import read_parquet
from lorafit.data.sources.tables import read_csv, read_tsv
from lorafit.data.sources.workbook import read_workbook


def read_file(
    path: Path, columns: Sequence[str], is_row: Callable[[RawRow], bool], *, prompts: bool = False
) -> RawRows:
    """The rows of a local file.

    Args:
        path: The file, checked by `check_file`.
        columns: Source columns that the recipe maps; numbers mean that a table has no header.
        is_row: Whether an object looks like a row of a known format (a json file may hold one row, or wrap a list).
        prompts: Whether a line of text is a prompt, rather than the file one text to train on.
    """
    suffix = suffix_of(path)
    if suffix == ".json":
        return read_json_file(path, is_row)
    if suffix == ".csv":
        return read_csv(path, columns, is_row)
    if suffix == ".tsv":
        return read_tsv(path, columns)
    if suffix == ".parquet":
        return read_parquet(path)
    if suffix == ".xlsx":
        return read_workbook(path, columns)
    if suffix == ".txt":
        row = first_object(path)
        if row is None or not (prompts or is_row(row)):
            return read_prompt_lines(path) if prompts else read_txt(path)
    return read_jsonl(path)
