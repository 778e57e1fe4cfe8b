"""What answers: a run by its card, an adapter folder alone, or a model folder. No training row is opened.

RUN ────────> card.json ──┐
ADAPTER ────> lorafit.json┴──> base, found again ──> model + adapter ──> Speaker
MODEL ──────────────────────────────────────────────────────────────────> Speaker
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.contracts import Silent
from lorafit.errors import CheckpointError, DataError, LorafitError, UsageError
from lorafit.job import Job, autocast_dtype, look_for_rows, open_job, prepare_rows, torch_dtype
from lorafit.kinds.tasks import tasks
from lorafit.machine.devices import read_device
from lorafit.run.card import RunCard, read_card
from lorafit.run.workspace import (
    OpenedRun,
    both_recipes,
    compare_recipes,
    is_lone_adapter,
    is_model,
    open_run,
    sources_of,
)

if TYPE_CHECKING:
    from lorafit.answering.speaker import Speaker
    from lorafit.contracts import Reporter
    from lorafit.data.sample_renderer import Renderer
    from lorafit.model.adapter import AdapterFolder
    from lorafit.model.base import Base
    from lorafit.recipe.schema import DataSection, SourceSection


@dataclass(frozen=True)
class Tuned:
    """A trained adapter with its run's card and its base, weights not loaded."""

    card: RunCard
    base: Base
    adapter: Path

    def load(self, reporter: Reporter) -> Any:
        """Base and adapter in the precision of the run."""
        from lorafit.model.adapter import open_adapter
        from lorafit.model.load import load_model

        model = load_model(
            self.base,
            quantization=self.card.quantization,
            dtype=torch_dtype(self.card.dtype),
            compute_dtype=torch_dtype(self.card.compute_dtype),
            attention=self.card.attention,
            device=read_device().kind,
            auto_class=tasks.get(self.card.task).auto_class,
            reporter=reporter,
        )
        return open_adapter(model, self.adapter, trainable=False, base=self.base, reporter=reporter)

    def tokenizer(self) -> Any:
        """The tokenizer that was trained with; its templates are those of the card."""
        from lorafit.model.load import load_tokenizer
        from lorafit.model.tokenizer_files import DEFAULT, TokenizerFolder

        beside = TokenizerFolder(self.adapter).has_tokenizer()
        tokenizer = load_tokenizer(self.base, self.adapter if beside else None)
        templates = dict(self.card.templates)
        tokenizer.chat_template = templates[DEFAULT] if templates.keys() == {DEFAULT} else templates or None
        return tokenizer

    def renderer(self, data: DataSection, tokenizer: Any) -> Renderer:
        """What turns rows and prompts into tokens as training did.

        Args:
            data: The recipe's section, with the card's system prompt; the template is the card's.
            tokenizer: From `tokenizer`.
        """
        from lorafit.data.sample_renderer import Renderer

        named = self.card.templates["default"] if self.card.template_is_named else None
        return Renderer(tokenizer, data, named, self.now())

    def now(self) -> datetime | None:
        """The moment that templates take for the present one; None where they do not ask."""
        return datetime.fromisoformat(self.card.template_date) if self.card.template_date else None


_FIXED = ("model.", "adapter.", "task", "data.chat_template", "data.system_prompt")
"""What a trained run is: it is taken from the run's card, whatever a recipe says now."""


def check_fixed(opened: OpenedRun, overrides: Sequence[str], reporter: Reporter) -> None:
    """Refuses a flag over what a trained run is; warns where the recipe was changed there since.

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


def settle_evaluation(opened: OpenedRun, overrides: Sequence[str], reporter: Reporter) -> OpenedRun:
    """The run as it is evaluated with flags over its recipe.

    Raises:
        UsageError: A flag would change what was trained.
    """
    check_fixed(opened, overrides, reporter)
    return keep_columns(opened)


def keep_columns(opened: OpenedRun) -> OpenedRun:
    """The run with its own names of columns for other rows than its own, where these rows have such columns.

    A source that says itself how its rows are read is left as it is.
    """
    from lorafit.recipe.load import load_recipe

    before, now = both_recipes(opened.run, opened.loaded)
    recipe, own = opened.loaded.recipe, load_recipe(opened.run.recipe).recipe
    changed: dict[str, dict[str, Any]] = {"data": {}, "evaluation": {}}
    for key, sources in sources_of(recipe).items():
        if key == "data.train" or before.get(key) == now.get(key):
            continue
        replaced = [source.columns for source in sources_of(own).get(key, ())]
        others = [source.columns for each in sources_of(own).values() for source in each]
        known = [columns for columns in [*replaced, *others] if columns]
        section, _, name = key.partition(".")
        changed[section][name] = [_with_columns(source, known, opened.loaded.folder) for source in sources]
    data = recipe.data.model_copy(update=changed["data"])
    evaluation = recipe.evaluation.model_copy(update=changed["evaluation"])
    recipe = recipe.model_copy(update={"data": data, "evaluation": evaluation})
    return replace(opened, loaded=replace(opened.loaded, recipe=recipe))


def _with_columns(source: SourceSection, known: Sequence[Mapping[str, str]], folder: Path) -> SourceSection:
    """The source read by the first of the mappings that its rows have the columns of; as it is where there is none."""
    from lorafit.data.sources.source import read_sources
    from lorafit.recipe.schema import BadRowsSection

    for columns in known if not source.columns and source.format == "auto" else ():
        mapped = source.model_copy(update={"columns": dict(columns)})
        with contextlib.suppress(LorafitError):  # told where rows are opened
            if all(one.has_its_columns for one in read_sources([mapped], folder, BadRowsSection(), Silent()).sources):
                return mapped
    return source


def changed_evaluation(opened: OpenedRun, split: str) -> dict[str, Any]:
    """By which values, and those of which keys, an evaluation is not that of the run's own recipe.

    Null stands for a key that the run has and this recipe has not. Sources of splits that are not scored count for
    nothing, since no row of them is read.

    Args:
        opened: The run, with its recipe as flags or later edits have it.
        split: Whose rows are scored.
    """
    from lorafit.recipe.schema import ValidationFraction

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


def find_card(opened: OpenedRun, reporter: Reporter) -> RunCard:
    """A run's card. One that an earlier version trained has none: it is made from recipe, plan and rows.

    Raises:
        CheckpointError: The card cannot be read, or rows are needed for it and are not here.
    """
    if opened.run.card.is_file():
        return read_card(opened.run.card)
    try:
        return open_job(opened.loaded, reporter, opened.began()).card(opened.resolved())
    except DataError as error:
        raise CheckpointError(
            f"has no card.json, since an earlier lorafit trained it, and its rows cannot be read: {error.what}",
            file=str(opened.run.root),
            todo="put its rows back, or merge a copy of its adapter folder",
        ) from error


def open_tuned(opened: OpenedRun, checkpoint: str | None, base_model: str | None, reporter: Reporter) -> Tuned:
    """A run's adapter with its card and its base.

    Args:
        opened: The run.
        checkpoint: `best`, `last` or a step; the saved adapter where None.
        base_model: Where the base is, as the user says; found where None.
        reporter: Told about what is looked for.

    Raises:
        CheckpointError: There is no such adapter, or no card.
        ModelError: The base is not on this disk, or is another one.
    """
    from lorafit.model.base import resolve_base
    from lorafit.model.find_base import find_base

    adapter, _ = opened.adapter(checkpoint)
    card, model = find_card(opened, reporter), opened.loaded.recipe.model
    if card.base.commit is not None:
        model = model.model_copy(update={"revision": card.base.commit})
    base = find_base(
        card.base,
        named=base_model,
        places=[*([Path(card.base_path)] if card.base_path else []), opened.loaded.folder / model.base],
        make=lambda: resolve_base(model, opened.loaded.folder, reporter),
        where=opened.run.root,
        reporter=reporter,
    )
    return Tuned(card, base, adapter)


def open_evaluation(opened: OpenedRun, tuned: Tuned, split: str, reporter: Reporter) -> Job:
    """What an evaluation of a run needs: rows of one split and of general ability, rendered as in training.

    Raises:
        DataError: The recipe has no such rows, or a file of them cannot be read.
    """
    from lorafit.model.class_shape import find_shape
    from lorafit.recipe.schema import ValidationFraction

    recipe, card = opened.loaded.recipe, tuned.card
    data = recipe.data.model_copy(update={"system_prompt": card.system_prompt})
    if {"test": data.test, "validation": data.validation, "train": data.train}[split] is None:
        todo = "add --set data.test=$PWD/FILE, or data.validation=$PWD/FILE for --split validation"
        raise DataError(f"the recipe has no {split} rows", key=f"data.{split}", todo=todo)
    is_held_out = split == "validation" and isinstance(data.validation, ValidationFraction)
    loaded = replace(opened.loaded, recipe=recipe.model_copy(update={"data": data}))
    wanted = ["data.train" if is_held_out else f"data.{split}", "evaluation.retention"]
    look_for_rows(loaded, only=wanted, todo="or score others: --set data.test=FILE")
    tokenizer, shape = tuned.tokenizer(), find_shape(tuned.base.config)
    renderer = tuned.renderer(data, tokenizer)
    rows = prepare_rows(loaded, renderer, shape, reporter, only=[split, "retention"])
    return Job(loaded, tuned.base, shape, tokenizer, renderer, rows, read_device())


def open_lone_adapter(adapter: Path, base_model: str | None, reporter: Reporter) -> tuple[AdapterFolder, Base]:
    """An adapter folder that came without its run, and its base, which must be on this disk.

    Raises:
        ModelError: It is no adapter, or its base is not here, or another one.
    """
    from lorafit.model.adapter import read_adapter
    from lorafit.model.base import resolve_base
    from lorafit.model.find_base import find_base, find_foreign_base
    from lorafit.recipe.schema import ModelSection

    saved = read_adapter(adapter)
    card = saved.card()
    written = str(saved.config.get("base_model_name_or_path") or "")
    if card is None:
        revision = saved.config.get("revision")
        return saved, find_foreign_base(
            written, str(revision) if revision else None, named=base_model, where=adapter, reporter=reporter
        )
    package = ModelSection(base=card.base.name) if card.base.kind == "package" else None
    base = find_base(
        card.base,
        named=base_model,
        places=[Path(written)] if Path(written).is_absolute() else [],
        make=(lambda: resolve_base(package, adapter, reporter)) if package else None,
        where=adapter,
        reporter=reporter,
    )
    return saved, base


def open_speaker(path: Path, checkpoint: str | None, base_model: str | None, reporter: Reporter) -> Speaker:
    """What answers prompts: a run's adapter on its base, an adapter alone, or a plain model folder; nothing loaded yet.

    Raises:
        UsageError: There is nothing at the path, or a base is named for a model that needs none.
        CheckpointError: It is neither a run nor an adapter nor a model.
        ModelError: The base is not on this disk, or is another one.
    """
    from lorafit.answering.speaker import Speaker, chats_of, open_plain_model
    from lorafit.model.adapter import read_notes

    lone = is_lone_adapter(path)
    if checkpoint is not None and (lone or is_model(path)):
        raise UsageError("only a run has checkpoints", key="--checkpoint", todo="name a run folder, or leave it out")
    if is_model(path):
        if base_model is not None:
            raise UsageError("a whole model has no base", key="--base-model", todo="name a run or an adapter folder")
        load, tokenizer = open_plain_model(path, reporter)
        speaks = read_notes(path).get("chat") is not False  # a merge of a run on verbatim rows says so
        return Speaker(load, tokenizer, chats_of(tokenizer) if speaks else None)
    if not lone:
        opened = open_run(path)
        tuned = open_tuned(opened, checkpoint, base_model, reporter)
        tokenizer = tuned.tokenizer()
        data = opened.loaded.recipe.data.model_copy(update={"system_prompt": tuned.card.system_prompt})
        chats = tuned.renderer(data, tokenizer).chats if tuned.card.chat else None
        return Speaker(partial(tuned.load, reporter), tokenizer, chats, autocast_dtype(tuned.card.dtype))
    saved, base = open_lone_adapter(path, base_model, reporter)
    card = saved.card()
    if card is None:
        return _speak_foreign(saved, base, reporter)
    tuned = Tuned(card, base, path)
    tokenizer = tuned.tokenizer()
    chats = chats_of(tokenizer, system_prompt=card.system_prompt, now=tuned.now()) if card.chat else None
    return Speaker(partial(tuned.load, reporter), tokenizer, chats, autocast_dtype(card.dtype))


def _speak_foreign(saved: AdapterFolder, base: Base, reporter: Reporter) -> Speaker:
    """An adapter without a card on its base, with the tokenizer and templates that a merge of it would get.

    The base is loaded as its file has it, or quantised where an earlier lorafit noted how.
    """
    import tempfile

    from lorafit.answering.speaker import Speaker, chats_of
    from lorafit.files.safetensors import main_dtype, read_index
    from lorafit.files.safetensors import torch_dtype as dtype_of
    from lorafit.kinds.quantizations import quantizations
    from lorafit.model.adapter import open_adapter
    from lorafit.model.load import load_model, load_tokenizer
    from lorafit.model.merge.companions import choose_companions

    with tempfile.TemporaryDirectory(prefix="lorafit-") as folder:
        choose_companions(base, saved, reporter).write(Path(folder))
        tokenizer = load_tokenizer(base, Path(folder))
    used = saved.quantization() or {"kind": "none"}
    named = quantizations.section(str(used.get("kind")))
    section = named(**{key: value for key, value in used.items() if key in named.model_fields})
    noted = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(str(used.get("weights_dtype")))
    dtype = torch_dtype(noted) if noted else dtype_of(main_dtype(read_index(base.path)))

    def load() -> Any:
        model = load_model(
            base,
            quantization=section,
            dtype=dtype,
            compute_dtype=dtype,
            attention="auto",
            device=read_device().kind,
            reporter=reporter,
        )
        return open_adapter(model, saved.path, trainable=False, base=base, reporter=reporter)

    return Speaker(load, tokenizer, chats_of(tokenizer))
