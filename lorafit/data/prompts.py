"""Prompts that a model is to answer, read as training reads its rows: the same files, formats and columns.

    --prompt TEXT ───────────────────────┐
    --input FILE ──> Source(prompts) ────┼──> Sample without its answer ──> the renderer that trained
    a program's rows ──> their formats ──┘

Of a row that holds its answer, the prompt is what stands before it. What cannot be understood is refused with file and
line, never passed on as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lorafit.contracts import JsonMapping, Reporter, Sample, Silent
from lorafit.data.sources.files import find_files
from lorafit.data.sources.row_columns import NO_PROMPT, Columns, find_format, no_prompt, rename, written
from lorafit.data.sources.sample_set import SampleSet
from lorafit.data.sources.source import Source
from lorafit.data.sources.tables import are_numbers
from lorafit.errors import DataError, LorafitError, UsageError, raise_all
from lorafit.kinds.formats import formats
from lorafit.kinds.tasks import Task, TaskSection
from lorafit.recipe.schema import BadRowsSection, SourceSection

COMMAND_LINE = "--prompt"


def column_names(sources: Sequence[SourceSection]) -> list[Columns]:
    """The ways in which columns of prompts may be called, in the order in which they are tried.

    What a recipe maps comes first, then the formats' own names. Numbers, under which any line of a table is a row, its
    header too, come last, and only where the recipe maps nothing by name.
    """
    mapped: list[Columns] = []
    for source in sources:
        if source.columns and source.columns not in mapped:
            mapped.append(source.columns)
    named = [columns for columns in mapped if not are_numbers(list(columns.values()))]
    return [*named, {}] if named else [{}, *mapped]


def read_prompt(text: str) -> list[Sample]:
    """The prompt of a command line.

    Raises:
        UsageError: It is blank.
    """
    if not text.strip():
        raise UsageError("the prompt is empty", key=COMMAND_LINE, todo="give it a text")
    return [Sample(COMMAND_LINE, 0, prompt=text)]


def read_prompt_file(
    file: Path, known: Sequence[Columns], reporter: Reporter, task: Task[TaskSection] | None = None
) -> list[Sample]:
    """The prompts of a file: each line of a txt file, each row of any other that training reads.

    Args:
        file: The file, relative to the working folder; or a pattern of files.
        known: From `column_names`; the first that the file's columns go by is used.
        reporter: Warned of columns that are not read.
        task: Whose format is looked for first; None for any.

    Raises:
        DataError: The file is missing or no data, or a row has no prompt; several as `Problems`.
    """
    files = find_files(str(file), Path(), start="the working folder")
    return list(SampleSet([_open(name, known, task) for name in files], BadRowsSection(), reporter))


def _open(file: str, known: Sequence[Columns], task: Task[TaskSection] | None) -> Source:
    refused: LorafitError | None = None
    for columns in known:
        section = SourceSection.model_construct(path=file, columns=dict(columns))
        try:
            return Source(section, Path(), Silent(), prompts=True, task=task)
        except LorafitError as error:
            refused = error if refused is None or not columns else refused
    assert refused is not None, "column_names gives at least the formats' own"
    if known[0] and refused.todo is not None and refused.what.startswith(NO_PROMPT):
        refused.todo = f"write them as the run's recipe does: {written(known[0])}; or {refused.todo}"
    raise refused


def read_prompt_rows(
    rows: Sequence[str | JsonMapping], known: Sequence[Columns], task: Task[TaskSection] | None = None
) -> list[Sample]:
    """The prompts of a program: texts, or rows as training has them, each in its own format.

    `task`: whose format is looked for first; None for any.

    Raises:
        DataError: There are none, or one has no prompt; several as `Problems`.
    """
    found: list[Sample] = []
    errors: list[LorafitError] = []
    for number, row in enumerate(rows):
        place = f"prompts[{number}]"
        try:
            found.append(_read_row(row, known, place, task))
        except DataError as error:
            errors.append(error.at(file=place))
    raise_all(errors[:5], file="prompts")
    if not found:
        raise DataError("there are none", key="prompts", todo="give at least one")
    return found


def _read_row(row: str | JsonMapping, known: Sequence[Columns], place: str, task: Task[TaskSection] | None) -> Sample:
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise DataError(f"expected a text or a dict, found {type(row).__name__}")
    for columns in known:
        renamed = rename(dict(row), columns)
        name = find_format(renamed, columns, prompts=True, wanted=None if task is None else task.row_format)
        if name is not None:
            return formats.get(name).read_prompt(renamed, place, 0)
    raise no_prompt(dict(row))
