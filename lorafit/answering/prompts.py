"""The prompts that `generate` is asked: one, a file of them, or rows from memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorafit.contracts import JsonMapping, Reporter, Sample
from lorafit.errors import UsageError
from lorafit.kinds.tasks import Task, TaskSection, tasks
from lorafit.recipe.schema import SourceSection, sources_of
from lorafit.run.workspace import is_lone_adapter, is_model, open_run

_HERE = "the working folder"


def check_prompts(prompt: str | None, input_file: Path | None, rows: Sequence[str | JsonMapping] | None) -> None:
    """Refuses what can be told of prompts in milliseconds: none or several are given, a blank one, a file that is none.

    Raises:
        UsageError: As said of the command line.
        DataError: The file is missing, or no data.
    """
    if prompt is not None and input_file is not None:
        raise UsageError("is given beside --input", key="--prompt", todo="leave one of them out")
    if (prompt, input_file, rows).count(None) != 2:
        raise UsageError("needs a prompt", key="--prompt", todo="give either --prompt TEXT or --input FILE")
    from lorafit.data.prompts import read_prompt
    from lorafit.data.sources.files import check_file, find_files

    if prompt is not None:
        read_prompt(prompt)
    for file in find_files(str(input_file), Path(), start=_HERE) if input_file is not None else ():
        check_file(Path(file).expanduser(), file, start=_HERE)


def sources_of_run(path: Path) -> list[SourceSection]:
    """The sources of a run's recipe, which name the columns of its rows; none of a model or adapter without a run."""
    if is_model(path) or is_lone_adapter(path):
        return []
    return [source for part in sources_of(open_run(path).loaded.recipe).values() for source in part]


def read_prompts(
    run_or_model: Path,
    prompt: str | None,
    input_file: Path | None,
    rows: Sequence[str | JsonMapping] | None,
    reporter: Reporter,
) -> list[Sample]:
    """The prompts, before anything heavy starts. A run knows by its recipe what its rows call their columns."""
    from lorafit.data.prompts import column_names, read_prompt, read_prompt_file, read_prompt_rows

    if prompt is not None:
        return read_prompt(prompt)
    known, task = column_names(sources_of_run(run_or_model)), _task_with_pictures(run_or_model)
    if input_file is not None:
        return read_prompt_file(input_file, known, reporter, task)
    return read_prompt_rows(rows or [], known, task)


def _task_with_pictures(run_or_model: Path) -> Task[TaskSection] | None:
    """The task of what answers, where its rows have images, which decides how they are read; else None."""
    if is_model(run_or_model) or is_lone_adapter(run_or_model):
        from lorafit.model.adapter import read_notes

        notes = read_notes(run_or_model)
        written = notes.get("task") or (notes.get("card") or {}).get("task")
        kind = written.get("kind") if isinstance(written, dict) else written
    else:
        kind = open_run(run_or_model).loaded.recipe.task.kind
    reads = kind in tasks.names() and tasks.get(str(kind)).reads_pictures
    return tasks.make(str(kind)) if reads else None
