"""Prompts with their answers, as a model that scores answers is given them: rows of any format that holds both.

rows ──formats──> samples, of a pair both sides ──the run's template, cut to its longest row──> tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.answering.prompts import sources_of_run
from lorafit.contracts import Encoded, JsonMapping, JsonObject, Reporter, Sample
from lorafit.data.prompts import column_names
from lorafit.data.sample_renderer import Renderer
from lorafit.data.sources.files import find_files
from lorafit.data.sources.row_columns import NO_FORMAT, find_format, rename, unknown_columns, written
from lorafit.data.sources.sample_set import SampleSet
from lorafit.data.sources.source import Source
from lorafit.errors import DataError, LorafitError, UsageError
from lorafit.kinds.formats import formats
from lorafit.recipe.schema import BadRowsSection, DataSection, SourceSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafit.data.sources.row_columns import Columns

Render = Callable[[Sample], Encoded | None]


def render_answers(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    data: DataSection,
    now: datetime | None = None,
) -> Render:
    """What makes tokens of a prompt with its answer, as training did; longer ones are cut as `truncate` does.

    Args:
        tokenizer: The model's.
        template: Makes a chat of every row; None: rows are verbatim text.
        data: The recipe's section: longest row, system prompt, what becomes of fields that the template drops.
        now: The moment that the template takes for the present one.
    """
    renderer = Renderer(tokenizer, data, template, now)

    def render(sample: Sample) -> Encoded | None:
        if template is None and sample.messages is not None:
            todo = "give prompt and answer as strings"
            raise DataError("is a chat, and this model was trained on verbatim text", key="messages", todo=todo)
        whole = renderer.render(sample)
        return whole if len(whole.input_ids) <= data.max_length else renderer.truncate(sample)

    return render


def read_answers(
    path: Path,
    prompt: str | None,
    input_file: Path | None,
    rows: Sequence[str | JsonMapping] | None,
    reporter: Reporter,
) -> list[Sample]:
    """The rows, before anything heavy starts; a run knows by its recipe what its rows call their columns.

    Args:
        path: The run, adapter or model.
        prompt: Refused: it has no answer.
        input_file: Rows as training reads them, one answer each, or two.
        rows: The same of a program.
        reporter: Gets warnings about columns.

    Raises:
        UsageError: There is a prompt alone.
        DataError: The file is missing or no data, or a row is of no format; several as `Problems`.
    """
    if prompt is not None or any(isinstance(row, str) for row in rows or ()):
        todo = "give rows of both: --input FILE"
        raise UsageError("this model scores a prompt with its answer", key="--prompt", todo=todo)
    known = column_names(sources_of_run(path))
    if rows is not None:
        dicts = [row for row in rows if not isinstance(row, str)]
        return [_read_row(row, known, f"prompts[{number}]") for number, row in enumerate(dicts)]
    files = find_files(str(input_file), Path(), start="the working folder")
    return list(SampleSet([_open(file, known, reporter) for file in files], BadRowsSection(), reporter))


def _open(file: str, known: Sequence[Columns], reporter: Reporter) -> Source:
    """By the first of the names that the file's rows go by."""
    refused: LorafitError | None = None
    for columns in known:
        try:
            return Source(SourceSection.model_construct(path=file, columns=dict(columns)), Path(), reporter)
        except LorafitError as error:
            refused = refused or error
    assert refused is not None, "column_names gives at least the formats' own"
    raise _advised(refused, known)


def _advised(error: LorafitError, known: Sequence[Columns]) -> LorafitError:
    """The error; where rows are of no format, with what can be done about rows that no recipe names."""
    if error.what.startswith(NO_FORMAT):
        as_the_run = f"write them as the run's recipe does: {written(known[0])}; or " if known[0] else ""
        error.todo = f"{as_the_run}name them prompt and completion, or prompt, chosen and rejected"
    return error


def _read_row(row: JsonMapping, known: Sequence[Columns], place: str) -> Sample:
    try:
        for columns in known:
            renamed = rename(row, columns)
            if (name := find_format(renamed, columns)) is not None:
                return formats.get(name).read(renamed, place, 0)
        raise unknown_columns(row, None, is_table=False)
    except DataError as error:
        raise _advised(error.at(file=place), known) from None


def single_answers(samples: Sequence[Sample]) -> list[Sample]:
    """Each answer by itself: of a pair the chosen one, then the rejected one."""
    return [
        replace(side, rejected=None)
        for sample in samples
        for side in (sample, *([sample.rejected] if sample.rejected is not None else []))
    ]


def join_pairs(samples: Sequence[Sample], found: Sequence[JsonObject]) -> list[JsonObject]:
    """What was found of each answer, an entry a row: of a pair both, by side."""
    left, joined = iter(found), []
    for sample in samples:
        one = next(left)
        if sample.rejected is not None:
            sides = {"chosen": one["values"], "rejected": next(left)["values"]}
            one = {"values": {f"{side}_{name}": value for side, own in sides.items() for name, value in own.items()}}
        joined.append(one)
    return joined
