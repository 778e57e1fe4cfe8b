"""A trained adapter with its card and its base, found again; no weight is loaded and no training row opened.

RUN ────> card.json ──────┐
ADAPTER ────> lorafit.json┴──> base, found again ──> Tuned ──load──> Engine
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.contracts import Reporter
from lorafit.errors import CheckpointError, DataError
from lorafit.job import open_job, open_pictures
from lorafit.kinds.linear_targets import new_tokens
from lorafit.kinds.tasks import tasks
from lorafit.machine.devices import read_device
from lorafit.model.adapter import ADAPTER_NAME, AdapterFolder, read_adapter
from lorafit.model.base import Base, resolve_base
from lorafit.model.find_base import find_base, find_foreign_base
from lorafit.model.tokenizer_files import DEFAULT, PROCESSOR_PATTERNS, TokenizerFolder
from lorafit.ops.dtypes import autocast_dtype, dtype_named
from lorafit.recipe.schema import DataSection, ModelSection
from lorafit.run.card import RunCard, read_card
from lorafit.run.workspace import OpenedRun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafit.answering.engine import Engine
    from lorafit.data.pictures import ProcessorPictures
    from lorafit.data.sample_renderer import Renderer


@dataclass(frozen=True)
class Tuned:
    """A trained adapter with its run's card and its base, weights not loaded."""

    card: RunCard
    base: Base
    adapter: Path

    def load(self, tokenizer: PreTrainedTokenizerBase, reporter: Reporter, device: str | None = None) -> Engine:
        """Base and adapter in the precision of the run; on the device of this process where none is named."""
        engine = self.load_base(tokenizer, reporter, device)
        engine.add_adapter(ADAPTER_NAME, self.adapter, reporter)
        return engine

    def load_base(self, tokenizer: PreTrainedTokenizerBase, reporter: Reporter, device: str | None = None) -> Engine:
        """The base alone, loaded as for its adapter."""
        from lorafit.answering.engine import Engine
        from lorafit.answering.plain_generation import begin_as
        from lorafit.model.inspect import recorded_linears
        from lorafit.model.load import load_model

        model = load_model(
            self.base,
            quantization=self.card.quantization,
            dtype=dtype_named(self.card.dtype),
            compute_dtype=dtype_named(self.card.compute_dtype),
            attention=self.card.attention,
            device=device or read_device().kind,
            model_class=self.card.model_class,
            quantised=recorded_linears(read_adapter(self.adapter).quantization()),
            reporter=reporter,
        )
        autocast, kind = autocast_dtype(self.card.dtype), self.card.quantization.kind
        begin_as(model, self.card.generation)
        return Engine(
            model, tokenizer, autocast_dtype=autocast, base=self.base, quantization=kind, reader=self.pictures
        )

    @cached_property
    def pictures(self) -> ProcessorPictures | None:
        """What reads images as the run did; None for a run on text alone."""
        if not tasks.bind(self.card.task).reads_pictures:
            return None
        beside = TokenizerFolder(self.adapter)
        is_whole = beside.has_tokenizer() and beside.files(PROCESSOR_PATTERNS)
        return open_pictures(self.base, self.adapter if is_whole else None)

    def tokenizer(self, known: Mapping[str, PreTrainedTokenizerBase] | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer that was trained with; its templates are those of the card.

        `known`: others in memory by their hash, as cards note it; the same one is shared, not read again.
        """
        from lorafit.model.load import load_tokenizer

        beside = TokenizerFolder(self.adapter).has_tokenizer()
        same = (known or {}).get(self.card.tokenizer)
        if same is not None and self.pictures is None:
            tokenizer = copy.copy(same)
        elif self.pictures is not None:
            tokenizer = self.pictures.tokenizer
        else:
            tokenizer = load_tokenizer(self.base, self.adapter if beside else None)
        templates = dict(self.card.templates)
        tokenizer.chat_template = templates[DEFAULT] if templates.keys() == {DEFAULT} else templates or None
        return tokenizer

    def renderer(self, data: DataSection, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        """What turns rows and prompts into tokens as training did.

        Args:
            data: The recipe's section, with the card's system prompt; the template is the card's.
            tokenizer: From `tokenizer`.
        """
        from lorafit.data.sample_renderer import Renderer

        named = self.card.templates["default"] if self.card.template_is_named else None
        two_texts = tasks.bind(self.card.task).two_texts
        return Renderer(tokenizer, data, named, self.now(), two_texts, self.pictures)

    def now(self) -> datetime | None:
        """The moment that templates take for the present one; None where they do not ask."""
        return datetime.fromisoformat(self.card.template_date) if self.card.template_date else None


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
    adapter, _ = opened.adapter(checkpoint)
    card, model = find_card(opened, reporter), opened.loaded.recipe.model
    if (saved := read_adapter(adapter).card()) is not None:  # what evaluations settled by that step
        card = card.model_copy(update={"task": saved.task})
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
    return Tuned(card, replace(base, new_tokens=new_tokens(card.adapter)), adapter)


def open_lone_adapter(adapter: Path, base_model: str | None, reporter: Reporter) -> tuple[AdapterFolder, Base]:
    """An adapter folder that came without its run, and its base, which must be on this disk.

    Raises:
        ModelError: It is no adapter, or its base is not here, or another one.
    """
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
    return saved, replace(base, new_tokens=new_tokens(card.adapter))
