"""What answers at a path: a run by its card, an adapter folder alone, or a model folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorafit.answering.engine import Engine
from lorafit.answering.tuned import Tuned, open_lone_adapter, open_tuned
from lorafit.answering.voice import Voice
from lorafit.errors import LorafitError, ModelError, UsageError
from lorafit.facts import CAUSAL_MODEL, ModelClass
from lorafit.files.safetensors import main_dtype, read_index, torch_dtype
from lorafit.kinds.quantizations import quantizations
from lorafit.kinds.tasks import Task, TaskSection, tasks
from lorafit.machine.devices import read_device
from lorafit.model.adapter import ADAPTER_NAME, NOTES, read_notes
from lorafit.model.base import Base, open_folder
from lorafit.model.companions import choose_companions
from lorafit.model.inspect import NOTED_DTYPES
from lorafit.model.load import load_model, load_tokenizer
from lorafit.run.workspace import is_lone_adapter, is_model, open_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorafit.contracts import Reporter
    from lorafit.kinds.quantizations import QuantizationSection
    from lorafit.model.adapter import AdapterFolder


@dataclass(frozen=True)
class Answerer:
    """What answers prompts, its weights not loaded yet.

    Attributes:
        voice: How it is asked.
        load: Gives its Engine.
        adapter: Which adapter of the Engine answers; None: a plain model does.
    """

    voice: Voice
    load: Callable[[], Engine]
    adapter: str | None = ADAPTER_NAME


def open_answerer(path: Path, checkpoint: str | None, base_model: str | None, reporter: Reporter) -> Answerer:
    """A run's adapter on its base, an adapter alone, or a plain model folder, nothing loaded yet.

    Raises:
        UsageError: There is nothing at the path, or a base is named for a model that needs none.
        CheckpointError: It is neither a run nor an adapter nor a model.
        ModelError: The base is not on this disk, or is another one.
    """
    lone = is_lone_adapter(path)
    if checkpoint is not None and (lone or is_model(path)):
        raise UsageError("only a run has checkpoints", key="--checkpoint", todo="name a run folder, or leave it out")
    if is_model(path):
        if base_model is not None:
            raise UsageError("a whole model has no base", key="--base-model", todo="name a run or an adapter folder")
        noted = noted_task(path)
        if noted is not None:
            _require_answers(noted)
        voice, load = open_plain_model(path, reporter)
        return Answerer(voice, load, adapter=None)
    if not lone:
        opened = open_run(path)
        tuned = open_tuned(opened, checkpoint, base_model, reporter)
        _require_answers(tasks.bind(tuned.card.task))
        tokenizer = tuned.tokenizer()
        data = opened.loaded.recipe.data.model_copy(update={"system_prompt": tuned.card.system_prompt})
        chats = tuned.renderer(data, tokenizer).chats if tuned.card.chat else None
        return Answerer(Voice(tokenizer, chats), partial(tuned.load, tokenizer, reporter))
    saved, base = open_lone_adapter(path, base_model, reporter)
    card = saved.card()
    if card is None:
        return _open_foreign(saved, base, reporter)
    _require_answers(tasks.bind(card.task))
    tuned = Tuned(card, base, path)
    tokenizer = tuned.tokenizer()
    voice = Voice.of_tokenizer(tokenizer, system_prompt=card.system_prompt, now=tuned.now())
    return Answerer(voice if card.chat else Voice(tokenizer, None), partial(tuned.load, tokenizer, reporter))


def _require_answers(task: Task[TaskSection]) -> None:
    """Raises ModelError where the models of a task write no text."""
    if not task.writes_answers:
        raise ModelError(f"a model of task {task.section.kind} writes no text", key="task", todo="use lorafit eval")


def noted_task(folder: Path) -> Task[TaskSection] | None:
    """The task that a merged model's head is for; None for a model of no such note, which is a causal one.

    Raises:
        ModelError: lorafit.json notes what is no task.
    """
    written = read_notes(folder).get("task")
    if written is None:
        return None
    try:
        options = {"kind": written} if isinstance(written, str) else dict(written)
        return tasks.make(**{"name" if key == "kind" else key: value for key, value in options.items()})
    except (LorafitError, TypeError, ValueError) as error:
        todo = "restore the file, or merge again"
        raise ModelError("notes no task", file=str(folder / NOTES), key="task", todo=todo) from error


def open_plain_model(folder: Path, reporter: Reporter) -> tuple[Voice, Callable[[], Engine]]:
    """A model folder (a merge, say): how it is asked, and what loads it as a base is, in the precision of its file.

    Raises:
        CheckpointError: The folder has a MANIFEST and is not what that says.
        ModelError: It cannot be loaded.
        SafetyError: It holds only pickles, or asks for foreign code.
    """
    task = noted_task(folder)
    model_class = CAUSAL_MODEL if task is None else task.model_class.whole()
    base = open_folder(folder, model_class)
    tokenizer = load_tokenizer(base)
    verbatim = read_notes(folder).get("chat") is False  # a merge of a run on verbatim rows says so
    dtype = torch_dtype(main_dtype(read_index(folder)))

    def load() -> Engine:
        plain = quantizations.make("none").section
        return Engine(_load_base(base, plain, dtype, reporter, model_class), tokenizer, base=base)

    return Voice(tokenizer, None) if verbatim else Voice.of_tokenizer(tokenizer), load


def _open_foreign(saved: AdapterFolder, base: Base, reporter: Reporter) -> Answerer:
    """An adapter without a card on its base, with the tokenizer and templates that a merge of it would get.

    The base is loaded as its file has it, or quantised where an earlier lorafit noted how.
    """
    with tempfile.TemporaryDirectory(prefix="lorafit-") as folder:
        choose_companions(base, saved, reporter).write(Path(folder))
        tokenizer = load_tokenizer(base, Path(folder))
    used = saved.quantization() or {"kind": "none"}
    kind = str(used.get("kind"))
    fields = quantizations.section(kind).model_fields
    section: QuantizationSection = quantizations.make(kind, **{k: v for k, v in used.items() if k in fields}).section
    noted = used.get("weights_dtype")
    dtype = getattr(torch, noted) if noted in NOTED_DTYPES else torch_dtype(main_dtype(read_index(base.path)))

    def load() -> Engine:
        engine = Engine(_load_base(base, section, dtype, reporter), tokenizer, base=base, quantization=kind)
        engine.add_adapter(ADAPTER_NAME, saved.path, reporter)
        return engine

    return Answerer(Voice.of_tokenizer(tokenizer), load)


def _load_base(
    base: Base,
    section: QuantizationSection,
    dtype: torch.dtype,
    reporter: Reporter,
    model_class: ModelClass = CAUSAL_MODEL,
) -> PreTrainedModel:
    """A base of which no run says how it was computed: in one dtype throughout, by the model's usual attention."""
    return load_model(
        base,
        quantization=section,
        dtype=dtype,
        compute_dtype=dtype,
        attention="auto",
        device=read_device().kind,
        model_class=model_class,
        reporter=reporter,
    )
