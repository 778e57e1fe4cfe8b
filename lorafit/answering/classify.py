"""Labels of texts: what a run, an adapter or a merged model of a task with labels says of them.

texts ──tokenizer, cut to the run's longest row──> rows ──by length──> micro-batches ──task.label──> labels
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorafit.answering.answer_rows import Render, join_pairs, read_answers, render_answers, single_answers
from lorafit.answering.engine import Engine
from lorafit.answering.opening import noted_task, open_plain_model, warn_of_cut_texts
from lorafit.answering.prompts import sources_of_run
from lorafit.answering.tuned import Tuned, open_lone_adapter, open_tuned
from lorafit.contracts import Encoded, Example, JsonMapping, JsonObject, Reporter, Sample, Silent
from lorafit.data.batch import cut_step
from lorafit.data.id_range import check_ids
from lorafit.data.plain_text import PlainText
from lorafit.data.prompts import COMMAND_LINE, column_names, read_prompt
from lorafit.data.sources.files import find_files
from lorafit.data.sources.row_columns import Columns, rename
from lorafit.data.sources.sample_set import SampleSet
from lorafit.data.sources.source import Source
from lorafit.errors import DataError, MissingFieldError, ModelError, UsageError
from lorafit.kinds.fields import advise_renaming
from lorafit.kinds.formats import formats
from lorafit.kinds.tasks import Task, TaskSection, tasks
from lorafit.model.adapter import NOTES, read_notes
from lorafit.model.base_config import load_config
from lorafit.ops.dtypes import autocast_dtype
from lorafit.ops.isolation import evaluating
from lorafit.ops.process_memory import run_or_halve
from lorafit.recipe.schema import DataSection
from lorafit.run.card import RunCard
from lorafit.run.workspace import is_lone_adapter, is_model, open_run, refuse_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MICRO_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Classifier:
    """What labels texts, its weights not loaded yet.

    Attributes:
        task: Its task.
        max_length: Longest row in tokens; what lies behind is cut off, as in training.
        pad_id: Fills up short rows.
        load: Gives the model in memory, with its tokenizer.
        dtype: What the forward computes in; None: as the weights are.
        render: Of a task that is given answers, what makes tokens of them, from the tokenizer.
    """

    task: Task[TaskSection]
    max_length: int
    pad_id: int
    load: Callable[[], Engine]
    dtype: torch.dtype | None = None
    render: Callable[[PreTrainedTokenizerBase], Render] | None = None

    def read(
        self,
        path: Path,
        prompt: str | None,
        input_file: Path | None,
        rows: Sequence[str | JsonMapping] | None,
        reporter: Reporter,
    ) -> list[Sample]:
        """What is to be labelled, see `read_texts` and `read_answers`.

        Raises:
            DataError: There is nothing.
        """
        if self.task.classified_format is None:
            found = read_answers(path, prompt, input_file, rows, reporter)
        else:
            found = read_texts(path, self.task.classified_format, prompt, input_file, rows, reporter)
        if not found:
            file = "prompts" if input_file is None else str(input_file)
            raise DataError("no rows", file=file, todo="give at least one")
        return found

    def label(self, samples: Sequence[Sample], reporter: Reporter) -> list[JsonObject]:
        """Labels with probabilities of each text, or numbers of each answer, in order.

        Raises:
            DataError: A text has no tokens, with its file and line.
        """
        if self.task.classifies_answers:
            return join_pairs(samples, self._label(single_answers(samples), reporter))
        return self._label(samples, reporter)

    def _label(self, samples: Sequence[Sample], reporter: Reporter) -> list[JsonObject]:
        engine = self.load()
        plain = PlainText(engine.tokenizer)

        def render_text(sample: Sample) -> Encoded:
            return plain.labelled(sample, self.max_length, self.task.keeps)

        as_trained = render_text if self.render is None else self.render(engine.tokenizer)
        encoded: list[Encoded] = []

        def render(sample: Sample) -> Encoded | None:
            if (one := as_trained(sample)) is not None:
                encoded.append(one)
            return one

        rows = []
        for number, sample in enumerate(samples):
            try:
                row = self.task.ask(sample, render)
            except DataError as error:
                raise error.at(file=sample.file, line=sample.line or None) from None
            if row is None:
                raise DataError("has no text to classify", file=sample.file, line=sample.line or None)
            check_ids(row.asked, engine.tokenizer, engine.embedding_rows)
            rows.append(Example(number, row.columns, sample.file, sample.line))
        warn_of_cut_texts(encoded, "text", self.max_length, reporter)
        objective = self.task.build_objective(engine.model, autocast_dtype=self.dtype)
        lengths = [len(row["tokens"]) for row in rows]
        tokens, found = max(_MICRO_BATCH_TOKENS, *lengths), dict[int, JsonObject]()

        def label(members: Sequence[int]) -> list[JsonObject]:
            batch = self.task.collate([[rows[row]] for row in members], self.pad_id).to(objective.device)
            with objective.autocast(batch):
                return self.task.label(objective, batch)

        with evaluating(objective), reporter.track(len(rows), "labels") as bar:
            micro_batches = cut_step(range(len(rows)), lengths, tokens)
            for members, labels in run_or_halve(label, micro_batches, objective.device):
                found |= dict(zip(members, labels, strict=True))
                bar.advance(len(members))
        return [_with_cut_words(found[row], samples[row]) for row in range(len(rows))]


def _with_cut_words(found: JsonObject, sample: Sample) -> JsonObject:
    """With the number of words that have no label, where the text was cut."""
    cut = len(sample.words) - len(found["labels"]) if sample.words else 0
    return {**found, "cut_words": cut} if cut > 0 else found


def open_classifier(path: Path, checkpoint: str | None, base_model: str | None, reporter: Reporter) -> Classifier:
    """A run's adapter on its base, an adapter alone, or a merged model folder, nothing loaded yet.

    Raises:
        UsageError: There is nothing at the path, or a base is named for a model that needs none.
        CheckpointError: It is neither a run nor an adapter nor a model.
        ModelError: Its task gives no labels, or the base is not on this disk, or is another one.
    """
    if is_model(path):
        if base_model is not None or checkpoint is not None:
            key = "--base-model" if base_model is not None else "--checkpoint"
            raise UsageError("a whole model has none", key=key, todo="name a run or an adapter folder")
        task, notes = noted_task(path), read_notes(path)
        if task is None:
            raise _gives_no_labels("causal-lm", True) if _writes_text(path) else _has_no_head(path)
        _require_labels(task)
        limit, pad_id = notes.get("max_length"), notes.get("pad_id")
        if not isinstance(limit, int) or not isinstance(pad_id, int):
            todo = "restore the file, or merge again"
            raise ModelError("notes no length of rows", file=str(path / NOTES), key="max_length", todo=todo)

        def render(tokenizer: PreTrainedTokenizerBase) -> Render:
            own = getattr(tokenizer, "chat_template", None)
            template = own if isinstance(own, str) and notes.get("chat") is not False else None
            return render_answers(tokenizer, template, DataSection.model_construct(train=[], max_length=limit))

        whole = open_plain_model(path, reporter)
        return Classifier(task, limit, pad_id, whole.load, render=render if task.classifies_answers else None)
    if is_lone_adapter(path):
        refuse_checkpoint(checkpoint)
        saved, base = open_lone_adapter(path, base_model, reporter)
        card = saved.card()
        if card is None:
            raise ModelError(
                "another tool made it, and says of no labels", file=str(path), todo="name a run of lorafit"
            )
        return _of_tuned(Tuned(card, base, path), card, reporter)
    opened = open_run(path)
    tuned = open_tuned(opened, checkpoint, base_model, reporter)
    return _of_tuned(tuned, tuned.card, reporter, opened.loaded.recipe.data)


def _of_tuned(tuned: Tuned, card: RunCard, reporter: Reporter, data: DataSection | None = None) -> Classifier:
    """`data`: The run's recipe's, which says what becomes of fields that the template drops; None: an adapter alone."""
    task = tasks.bind(card.task)
    _require_labels(task)
    load = partial(tuned.load, tuned.tokenizer(), reporter)
    template = card.templates["default"] if card.chat else None
    own = {"system_prompt": card.system_prompt, "max_length": card.max_length}
    data = DataSection.model_construct(train=[]) if data is None else data
    render = partial(render_answers, template=template, data=data.model_copy(update=own), now=tuned.now())
    autocast = autocast_dtype(card.dtype)
    return Classifier(
        task, card.max_length, card.pad_id, load, autocast, render=render if task.classifies_answers else None
    )


def _require_labels(task: Task[TaskSection]) -> None:
    if task.classified_format is None and not task.classifies_answers:
        raise _gives_no_labels(task.section.kind, task.writes_answers)


def _writes_text(model: Path) -> bool:
    return any(str(name).endswith("ForCausalLM") for name in load_config(model).get("architectures") or ())


def _has_no_head(model: Path) -> ModelError:
    todo = "train one first, with task: sequence-classification"
    return ModelError("has no head that lorafit trained, and so gives no labels", file=str(model), todo=todo)


def _gives_no_labels(kind: str, writes_text: bool) -> ModelError:
    todo = "use lorafit generate" if writes_text else "use lorafit eval, or the merged model in transformers"
    return ModelError(f"a model of task {kind} gives no labels", key="task", todo=todo)


def read_texts(
    path: Path,
    format_name: str,
    prompt: str | None,
    input_file: Path | None,
    rows: Sequence[str | JsonMapping] | None,
    reporter: Reporter,
) -> list[Sample]:
    """The texts that are to be labelled; a run knows by its recipe what its rows call the column that asks.

    Args:
        path: The run, adapter or model.
        format_name: `Task.classified_format`.
        prompt: One text.
        input_file: txt, one a line, or rows as training reads them, with labels or without.
        rows: A program's: texts, or rows.
        reporter: Gets warnings about columns.

    Raises:
        DataError: The file is missing or no data, or a row has no text; several as `Problems`.
        UsageError: The text is blank.
    """
    from lorafit.recipe.schema import BadRowsSection, SourceSection

    reader = formats.get(format_name)
    asks = next(name for name, is_needed in reader.fields.items() if is_needed)
    if prompt is not None:
        return [reader.read_prompt({"text": read_prompt(prompt)[0].prompt}, COMMAND_LINE, 0)]
    known: list[Columns] = [{}]
    if sources := sources_of_run(path):
        asked = [field for field, is_needed in reader.fields.items() if field == asks or not is_needed]
        mapped = [{field: source.columns[field] for field in asked if field in source.columns} for source in sources]
        named = [columns for columns in mapped if columns]
        known = column_names([SourceSection.model_construct(path="", columns=columns) for columns in named])
    if rows is not None:
        dicts = [{"text": row} if isinstance(row, str) else rename(row, _choose(row, known, asks)) for row in rows]
        try:
            return [reader.read_prompt(row, f"prompts[{number}]", 0) for number, row in enumerate(dicts)]
        except MissingFieldError as error:
            advise_renaming(error)
            raise

    def open_file(file: str) -> Source:
        """By the first of the names under which its first row has a text."""
        named = [{}] if file.endswith(".txt") else known
        sections = [SourceSection.model_construct(path=file, format=format_name, columns=dict(each)) for each in named]
        opened = [Source(section, Path(), Silent(), prompts=True) for section in sections]
        return next((one for one in opened if not isinstance(next(one.read(), (0, None))[1], DataError)), opened[0])

    files = find_files(str(input_file), Path(), start="the working folder")
    return list(SampleSet([open_file(file) for file in files], BadRowsSection(), reporter))


def _choose(row: JsonMapping, known: Sequence[Columns], asks: str) -> Columns:
    """The first of the names that a row has under what asks."""
    return next((columns for columns in known if columns.get(asks, asks) in row), known[0])
