"""The rows that a trained run is evaluated on: its recipe's, or others, rendered as in training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.answering.tuned import Tuned
from lorafit.contracts import GenerationRow, JsonObject, Reporter, Silent
from lorafit.data.sources.sample_set import read_sources
from lorafit.data.store import ExampleSet
from lorafit.errors import DataError, LorafitError, UsageError
from lorafit.evaluation.base_side import FittedBase
from lorafit.evaluation.evaluation import About
from lorafit.evaluation.further import Asking
from lorafit.evaluation.runner import Side, require_measurable
from lorafit.files.cache import key_of_code
from lorafit.job import Job, prepare_rows, refer
from lorafit.kinds.adapters import begins_as_base
from lorafit.kinds.metrics import metrics, with_companions
from lorafit.machine.devices import read_device
from lorafit.model.classes import read_settings
from lorafit.model.inspect import coverage
from lorafit.objective import Objective
from lorafit.recipe.load import LoadedRecipe, load_recipe
from lorafit.recipe.schema import BadRowsSection, SourceSection, ValidationFraction, sources_of
from lorafit.run.named_files import look_for_rows
from lorafit.run.workspace import OpenedRun, both_recipes, compare_recipes

if TYPE_CHECKING:
    import torch


_FIXED = ("model.", "adapter.", "task", "data.chat_template", "data.system_prompt")
"""What a trained run is: it is taken from the run's card, whatever a recipe says now."""

_LONGEST_PROMPT = 2048
"""Most tokens of a prompt that fills the model's context, with its answer: longer ones take minutes on a CPU."""

_OF_THE_RUN = {"adapter", "seed", "base_path", "template_date", "template_dates"}
"""Of a card, what changes nothing of its base."""


def settle_evaluation(opened: OpenedRun, overrides: Sequence[str], reporter: Reporter) -> OpenedRun:
    """The run as it is evaluated with flags over its recipe; warns where the recipe was changed in what was trained.

    Raises:
        UsageError: A flag would change what was trained.
    """
    for key in (override.partition("=")[0].strip() for override in overrides):
        if key.startswith(_FIXED) or key in ("model", "adapter"):
            todo = "use --base-model" if key == "model.base" else "train anew for that"
            raise UsageError("a trained run has its own", file="--set", key=key, todo=todo)
    changed, _ = compare_recipes(opened.run, opened.loaded)
    for what in changed:
        if what.startswith(_FIXED):
            reporter.warn(f"{what} in the recipe; the run is taken as it was trained")
    return _keep_columns(opened)


def _keep_columns(opened: OpenedRun) -> OpenedRun:
    """The run with its own names of columns for other rows than its own, where these rows have such columns.

    A source that says itself how its rows are read is left as it is.
    """
    before, now = both_recipes(opened.run, opened.loaded)
    recipe, own = opened.loaded.recipe, load_recipe(opened.run.recipe).recipe
    changed: dict[str, JsonObject] = {"data": {}, "evaluation": {}}
    for key, sources in sources_of(recipe).items():
        if key == "data.train" or before.get(key) == now.get(key):
            continue
        replaced = [source.columns for source in sources_of(own).get(key, ())]
        others = [source.columns for each in sources_of(own).values() for source in each]
        known = [columns for columns in [*replaced, *others] if columns]
        section, _, name = key.partition(".")
        changed[section][name] = [with_columns(source, known, opened.loaded.folder) for source in sources]
    data = recipe.data.model_copy(update=changed["data"])
    evaluation = recipe.evaluation.model_copy(update=changed["evaluation"])
    recipe = recipe.model_copy(update={"data": data, "evaluation": evaluation})
    return replace(opened, loaded=replace(opened.loaded, recipe=recipe))


def with_columns(source: SourceSection, known: Sequence[Mapping[str, str]], folder: Path) -> SourceSection:
    """The source read by the first of the mappings that its rows have the columns of; as it is where there is none."""
    for columns in known if not source.columns and source.format == "auto" else ():
        mapped = source.model_copy(update={"columns": dict(columns)})
        with contextlib.suppress(LorafitError):  # told where rows are opened
            if all(one.has_its_columns for one in read_sources([mapped], folder, BadRowsSection(), Silent()).sources):
                return mapped
    return source


def changed_evaluation(opened: OpenedRun, split: str) -> JsonObject:
    """By which values, and those of which keys, an evaluation is not that of the run's own recipe.

    Null stands for a key that the run has and this recipe has not. Sources of splits that are not scored count for
    nothing, since no row of them is read.

    Args:
        opened: The run, with its recipe as flags or later edits have it.
        split: Whose rows are scored.
    """
    recipe = opened.loaded.recipe
    is_held_out = split == "validation" and isinstance(recipe.data.validation, ValidationFraction)
    read = {f"data.{split}", *(["data.train"] if is_held_out else [])}
    ignored = tuple({"data.train", "data.validation", "data.test"} - read)
    before, now = both_recipes(opened.run, opened.loaded)
    return {
        key: now.get(key)
        for key in sorted(before.keys() | now.keys())
        if key.startswith(("data.", "evaluation.", "seed")) and not key.startswith((*_FIXED, *ignored))
        if before.get(key) != now.get(key)
    }


def open_evaluation(opened: OpenedRun, tuned: Tuned, split: str, reporter: Reporter) -> Job:
    """What an evaluation of a run needs: rows of one split and of general ability, rendered as in training.

    Raises:
        DataError: The recipe has no such rows, or a file of them cannot be read.
    """
    return _open_rows(opened.loaded, tuned, split, reporter)


def open_file(tuned: Tuned, file: Path, known: Sequence[Mapping[str, str]], reporter: Reporter) -> Job:
    """The same of a file of rows for an adapter that came without its run: longer rows are cut as `truncate` does.

    Args:
        tuned: The adapter with its card.
        file: The rows.
        known: Names of columns, of which the first that the rows have are taken.
        reporter: Gets progress and warnings.

    Raises:
        DataError: The file cannot be read, or holds no rows of the adapter's task.
    """
    card, source = tuned.card, with_columns(SourceSection(path=str(file.absolute())), known, Path())
    rows = {"path": source.path, "columns": dict(source.columns)}
    data: JsonObject = {"train": [rows], "test": [rows], "max_length": card.max_length, "overlength": "truncate"}
    values = {"name": "rows", "task": card.to_json()["task"], "model": {"base": card.base.name}, "data": data}
    return _open_rows(load_recipe({**values, "seed": card.seed}), tuned, "test", reporter)


def _open_rows(loaded: LoadedRecipe, tuned: Tuned, split: str, reporter: Reporter) -> Job:
    recipe, card = loaded.recipe, tuned.card
    data = recipe.data.model_copy(update={"system_prompt": card.system_prompt})
    if {"test": data.test, "validation": data.validation, "train": data.train}[split] is None:
        todo = "add --set data.test=FILE, or data.validation=FILE for --split validation"
        raise DataError(f"the recipe has no {split} rows", key=f"data.{split}", todo=todo)
    is_held_out = split == "validation" and isinstance(data.validation, ValidationFraction)
    model = recipe.model.model_copy(update={"quantization": card.quantization})
    trained = {"model": model, "adapter": card.adapter, "task": card.task}
    loaded = replace(loaded, recipe=recipe.model_copy(update={"data": data, **trained}))
    wanted = ["data.train" if is_held_out else f"data.{split}", "evaluation.retention"]
    look_for_rows(loaded, only=wanted, todo="or score others: --set data.test=FILE")
    tokenizer = tuned.tokenizer()
    renderer = tuned.renderer(data, tokenizer)
    rows, shape = prepare_rows(loaded, renderer, tuned.base.config, reporter, only=[split, "retention"])
    return Job(loaded, tuned.base, shape, tokenizer, renderer, rows, read_device())


def open_asking(opened: OpenedRun, job: Job, asked: Sequence[GenerationRow], reporter: Reporter) -> Asking:
    """What the recipe's metrics are given that ask more than the rows' own answers, or compare answers by an encoder.

    Args:
        opened: The run.
        job: Its rows and renderer.
        asked: Rows to answer.
        reporter: Told what is loaded.

    Raises:
        DataError: No metric of the recipe has a row that it can score.
        ModelError: The encoder is not there, or is none.
    """
    evaluation, encoder = job.recipe.evaluation, None
    require_measurable(asked, evaluation.final)
    embeds = {metrics.get(name).embeds for name in with_companions(evaluation.final)}
    if evaluation.encoder is not None and embeds != {"no"}:
        from lorafit.model.sentence_encoder import SentenceEncoder

        folder = opened.loaded.folder / Path(evaluation.encoder).expanduser()
        encoder = SentenceEncoder.open(folder, job.device.kind, reporter)
    positions = read_settings(job.base.config).get_text_config()
    return Asking(
        job.renderer.reword,
        evaluation.draws,
        evaluation.draw_temperature,
        job.recipe.seed,
        encoder,
        row_tokens=job.recipe.data.max_length,
        context_tokens=min(_LONGEST_PROMPT, getattr(positions, "max_position_embeddings", None) or _LONGEST_PROMPT),
    )


def refer_as_begun(
    job: Job, objective: Objective, opened: OpenedRun, tuned: Tuned, split: str, reporter: Reporter
) -> None:
    """Gives an evaluation's rows what their task asks of the model as it was before the first step.

    The objective's model, which is trained, is as it was then for as long as that takes: with the adapter that the run
    kept, or without any where it began as the base.

    Raises:
        ModelError: The run did not begin as the base, and has lost its first adapter.
        ResourceError: The cache cannot be written.
    """
    if not job.task.reference_columns:
        return
    from lorafit.model.attach import load_adapter_weights
    from lorafit.ops.isolation import adapter_off

    splits = (split, "retention")
    if begins_as_base(tuned.card.adapter):
        with adapter_off(objective.model):
            refer(job, objective, splits, reporter)
        return
    load_adapter_weights(objective.model, opened.run.first_adapter)
    refer(job, objective, splits, reporter)
    load_adapter_weights(objective.model, tuned.adapter)


def fit_base_side(
    job: Job, objective: Objective, opened: OpenedRun, tuned: Tuned, reporter: Reporter
) -> tuple[FittedBase | None, str]:
    """What scores the base, where its task fits something to it, and what the report says of that.

    It is fitted to the run's own training rows once, and kept in the run folder. Where those rows are gone, the base is
    scored with its head as it was drawn, and the report says so.

    Raises:
        ResourceError: The run folder cannot be written to.
    """
    task = job.task
    if not task.fitted_base:
        return None, ""
    from lorafit.evaluation.base_side import FittedBase, fit_base, read_arrays

    fitted = read_arrays(opened.run.base_head)
    if fitted is None:
        own, card = load_recipe(opened.run.recipe), tuned.card
        recipe = own.recipe.model_copy(update={"task": card.task})
        try:
            look_for_rows(replace(own, recipe=recipe), only=["data.train"])
            rows, _ = prepare_rows(
                replace(own, recipe=recipe), job.renderer, job.base.config, reporter, only=["train", "validation"]
            )
        except LorafitError as error:
            note = "its head is as it was drawn: the run's training rows, which it would be fitted to, are not here"
            reporter.warn(f"base: {note} ({error.errors[0].what})")
            return None, note
        fitted = fit_base(objective, task, rows.train, rows.validation, opened.run.base_head, job.pad_id, reporter)
    return FittedBase(objective, task.settle_base(fitted), fitted), task.fitted_base


def score_base_once(
    sides: dict[str, Side] | None, job: Job, tuned: Tuned, examples: ExampleSet, micro_batch_tokens: int
) -> Callable[[Callable[[], Side]], Side]:
    """What gives the base's side of an evaluation: by scoring it, or from one before that had all of it alike.

    Never shared is what a run decides: a head that is fitted to its rows, values at its step 0, images on the disk.

    Args:
        sides: Those of earlier evaluations, which is added to; None: there are none to keep.
        job: With the rows.
        tuned: The adapter, of which nothing but its card's other parts and its new tokens matter.
        examples: The rows to score.
        micro_batch_tokens: Of one forward.
    """
    task, retention = job.task, job.rows.splits.get("retention")
    if sides is None or task.fitted_base or task.reference_columns or task.reads_pictures:
        return lambda score: score()
    card = tuned.card.model_dump(mode="json", exclude=_OF_THE_RUN)
    rows = [examples.digest(), None if retention is None else retention.digest(), micro_batch_tokens]
    key = key_of_code([card, rows, tuned.base.new_tokens, job.recipe.evaluation.model_dump(mode="json")])

    def once(score: Callable[[], Side]) -> Side:
        if key not in sides:
            sides[key] = score()
        return sides[key]

    return once


def about_evaluation(opened: OpenedRun, model: torch.nn.Module, split: str, step: int | None) -> About:
    """What goes into the head of a report: whose adapter is scored on which rows, and whether it has seen them."""
    chose = split == "validation" and opened.loaded.recipe.evaluation.every_steps is not None
    return About(
        run=opened.run.root.name,
        checkpoint_step=step,
        split=split,
        seen_in_training=split == "train" or chose,
        trainable_parameters=opened.trained_parameters(),
        total_parameters=coverage(model).total_parameters,
    )
