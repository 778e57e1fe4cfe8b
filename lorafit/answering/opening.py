"""What answers at a path: a run by its card, an adapter folder alone, or a model folder; and how it is asked."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorafit.answering.engine import Engine
from lorafit.answering.tuned import Tuned, open_lone_adapter, open_tuned
from lorafit.console.wording import agreed, counted
from lorafit.contracts import Encoded, Reporter, Sample
from lorafit.data.chat.render import ChatRenderer
from lorafit.data.chat.template import RenderError
from lorafit.data.pictures import ask
from lorafit.data.plain_text import PlainText
from lorafit.data.source_target import SourceTarget
from lorafit.errors import DataError, LorafitError, ModelError, UsageError
from lorafit.facts import SEQ2SEQ_CLASS, ModelClass
from lorafit.files.safetensors import main_dtype, read_index, torch_dtype
from lorafit.job import open_pictures
from lorafit.kinds.quantizations import QuantizationSection, quantizations
from lorafit.kinds.row_limits import TwoTexts
from lorafit.kinds.tasks import Task, TaskSection, tasks
from lorafit.machine.devices import read_device
from lorafit.model.adapter import ADAPTER_NAME, NOTES, AdapterFolder, read_notes
from lorafit.model.base import Base, check_made, read_base
from lorafit.model.class_shape import find_shape
from lorafit.model.classes import reads_images, usual_class
from lorafit.model.companions import choose_companions
from lorafit.model.inspect import NOTED_DTYPES, recorded_linears
from lorafit.model.load import load_model, load_tokenizer
from lorafit.recipe.schema import LARGEST_COUNT, DataSection
from lorafit.run.card import RunCard
from lorafit.run.workspace import is_lone_adapter, is_model, open_run, refuse_checkpoint

if TYPE_CHECKING:
    from datetime import datetime

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorafit.answering.generate import Answer
    from lorafit.data.pictures import ProcessorPictures


@dataclass(frozen=True)
class Voice:
    """The tokenizer and template with which a model was trained, and so must be asked.

    Attributes:
        tokenizer: Encodes prompts and decodes answers.
        chats: Renders prompts as chats; None: prompts are used verbatim.
        apart: Encodes prompts for an encoder that reads them alone; None: the model goes on behind them.
        max_length: Most tokens of what such an encoder reads; the end of a longer text is cut off, as in training.
        pictures: Looks at the images of prompts; None where the model reads text alone.
    """

    tokenizer: PreTrainedTokenizerBase
    chats: ChatRenderer | None
    apart: SourceTarget | None = None
    max_length: int = 0
    pictures: ProcessorPictures | None = None

    @classmethod
    def of_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system_prompt: str | None = None,
        now: datetime | None = None,
        pictures: ProcessorPictures | None = None,
    ) -> Voice:
        """Chats by the tokenizer's own template; verbatim where it has none."""
        mark = "" if pictures is None else pictures.mark
        has_template = bool(getattr(tokenizer, "chat_template", None))
        chats = ChatRenderer(tokenizer, system_prompt=system_prompt, now=now, image_mark=mark) if has_template else None
        return cls(tokenizer, chats, pictures=pictures)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a turn in the chat template, or a target, beside those that end every answer of the model."""
        if self.apart is not None:
            return tuple(self.apart.ends)
        end = self.chats.end_of_turn_id() if self.chats is not None else None
        return () if end is None else (end,)

    def prompt_ids(self, prompt: Sample) -> list[int]:
        """The tokens of `ask`."""
        return self.ask(prompt).input_ids

    def ask(self, prompt: Sample) -> Encoded:
        """A prompt's tokens, the header of the answer included, as training rendered what stood before an answer; and
        its images.

        Raises:
            DataError: The template refuses the prompt or drops part of it, or it is a chat of more than one text and
                this model was trained on verbatim text; with the prompt's file and line.
        """
        try:
            if prompt.is_labelled:
                raise DataError("is a text with a label, which no prompt is", todo="name the column that asks: prompt")
            if self.apart is not None:
                return self.apart.source(_only_text(prompt), self.max_length)
            if self.chats is not None:
                return ask(self.chats, prompt.turns, prompt, self.pictures)
            ids = PlainText(self.tokenizer).prompt_ids(_only_text(prompt))
            return Encoded(ids, [False] * len(ids))
        except DataError as error:
            error.at(file=prompt.file, line=prompt.line or None)
            raise


@dataclass(frozen=True)
class Answerer:
    """What answers prompts, its weights not loaded yet.

    Attributes:
        voice: How it is asked.
        base: The base, or the plain model.
        quantization: The kind in which that is loaded.
        load_base: Gives an Engine of it alone.
        folder: The adapter's; None: a plain model answers.
        reporter: Warned where the adapter has no effect.
        card: The adapter's; None for a plain model, and for an adapter of another tool.
    """

    voice: Voice
    base: Base
    quantization: str
    load_base: Callable[[], Engine]
    folder: Path | None
    reporter: Reporter
    card: RunCard | None = None

    @property
    def adapter(self) -> str | None:
        """Which adapter of the Engine answers; None: a plain model does."""
        return None if self.folder is None else ADAPTER_NAME

    def load(self) -> Engine:
        """The Engine that answers."""
        engine = self.load_base()
        if self.folder is not None:
            engine.add_adapter(ADAPTER_NAME, self.folder, self.reporter)
        return engine


def open_answerer(
    path: Path,
    checkpoint: str | None,
    base_model: str | None,
    reporter: Reporter,
    known: Mapping[str, PreTrainedTokenizerBase] | None = None,
) -> Answerer:
    """A run's adapter on its base, an adapter alone, or a plain model folder, nothing loaded yet.

    Args:
        path: It.
        checkpoint: Of a run.
        base_model: Where the base is, as the user says.
        reporter: Told about what is looked for.
        known: See `Tuned.tokenizer`.

    Raises:
        UsageError: There is nothing at the path, or a base is named for a model that needs none.
        CheckpointError: It is neither a run nor an adapter nor a model.
        ModelError: The base is not on this disk, or is another one.
    """
    lone = is_lone_adapter(path)
    if lone or is_model(path):
        refuse_checkpoint(checkpoint)
    if is_model(path):
        if base_model is not None:
            raise UsageError("a whole model has no base", key="--base-model", todo="name a run or an adapter folder")
        if (noted := noted_task(path)) is not None:
            _require_answers(noted)
        return open_plain_model(path, reporter)
    data: DataSection | None = None
    if lone:
        saved, base = open_lone_adapter(path, base_model, reporter)
        if (card := saved.card()) is None:
            return _open_foreign(saved, base, reporter)
        tuned = Tuned(card, base, path)
    else:
        opened = open_run(path)
        tuned, data = open_tuned(opened, checkpoint, base_model, reporter), opened.loaded.recipe.data
    card = tuned.card
    _require_answers(tasks.bind(card.task))
    tokenizer = tuned.tokenizer(known)
    if (two_texts := tasks.bind(card.task).two_texts) is not None:
        voice = Voice(tokenizer, None, SourceTarget(tokenizer, two_texts), card.max_length)
    elif not card.chat:
        voice = Voice(tokenizer, None)
    elif data is None:
        voice = Voice.of_tokenizer(
            tokenizer, system_prompt=card.system_prompt, now=tuned.now(), pictures=tuned.pictures
        )
    else:  # the recipe says what becomes of fields that the template drops
        data = data.model_copy(update={"system_prompt": card.system_prompt})
        voice = Voice(tokenizer, tuned.renderer(data, tokenizer).chats, pictures=tuned.pictures)
    load_base = partial(tuned.load_base, tokenizer, reporter)
    return Answerer(voice, tuned.base, card.quantization.kind, load_base, tuned.adapter, reporter, card)


def warn_of_cut_texts(asked: Sequence[Encoded], noun: str, max_length: int, reporter: Reporter) -> None:
    """Says how many texts, or whatever the noun calls them, the model reads without the part that was cut off."""
    if cut := sum(each.is_cut for each in asked):
        said = f"{counted(cut, noun)} {agreed(cut, 'was', 'were')} cut"
        reporter.warn(f"{said}: data.max_length of the run is {counted(max_length, 'token')}")


def warn_of_empty(answers: Sequence[Answer], voice: Voice, reporter: Reporter) -> None:
    """Says why answers are empty: the model ended them at once, as one does that knows chats and is asked without."""
    empty = sum(not answer.text.strip() and answer.ended == "stop" for answer in answers)
    if not empty:
        return
    said = f"{empty} of {counted(len(answers), 'answer')} {agreed(empty, 'is', 'are')} empty: the model ended at once"
    if voice.chats is None and getattr(voice.tokenizer, "chat_template", None):
        said += (
            "; it was trained on verbatim text, so the prompt goes to it without its chat template: ask as its rows "
            "do, or train on chats (data.chat_template)"
        )
    reporter.warn(said)


def warn_of_cut(answers: Sequence[Answer], max_new_tokens: int, reporter: Reporter) -> None:
    """Says which answers do not end where the model would have ended them: what is missing is not to be seen."""
    cut = sum(answer.ended == "length" and answer.tokens >= max_new_tokens for answer in answers)
    full = sum(answer.ended != "stop" for answer in answers) - cut
    for count, where, todo in (
        (cut, counted(max_new_tokens, "token"), "raise --max-new-tokens"),
        (full, "the model's last position", "shorten the prompt"),
    ):
        if count:
            of = f"{count} of {counted(len(answers), 'answer')} {agreed(count, 'is', 'are')}"
            reporter.warn(f"{of} cut at {where}; {todo}")


def _require_answers(task: Task[TaskSection]) -> None:
    """Raises ModelError where the models of a task write no text."""
    if not task.writes_answers:
        todo = "use lorafit classify" if task.classified_format or task.classifies_answers else "use lorafit eval"
        raise ModelError(f"a model of task {task.section.kind} writes no text", key="task", todo=todo)


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


def open_plain_model(folder: Path, reporter: Reporter, device: str | None = None) -> Answerer:
    """A model folder (a merge, say), loaded as a base is, in the precision of its file.

    `device`: where to; this process's own where None.

    Raises:
        CheckpointError: The folder has a MANIFEST and is not what that says.
        ModelError: It cannot be loaded.
        SafetyError: It holds only pickles, or asks for foreign code.
    """
    task = noted_task(folder)
    check_made(folder)
    base = read_base(folder, is_compared=False)
    model_class = usual_class(base.config) if task is None else task.model_class.whole()
    find_shape(base.config, model_class)  # refuses what no model can be built from
    pictures = open_pictures(base) if task is not None and task.reads_pictures else None
    tokenizer = load_tokenizer(base) if pictures is None else pictures.tokenizer
    notes = read_notes(folder)
    verbatim = notes.get("chat") is False  # a merge of a run on verbatim rows says so
    dtype = torch_dtype(main_dtype(read_index(folder)))

    if task is not None and task.two_texts is not None:
        voice = Voice(tokenizer, None, SourceTarget(tokenizer, task.two_texts), int(notes["max_length"]))
    else:
        voice = Voice(tokenizer, None) if verbatim else _voice_of(base, tokenizer, pictures)
    reader = pictures or voice.pictures

    def load() -> Engine:
        plain = quantizations.make("none").section
        model = _load_base(base, plain, dtype, reporter, model_class, device)
        return Engine(model, tokenizer, base=base, quantization=plain.kind, reader=reader)

    return Answerer(voice, base, "none", load, None, reporter)


def _voice_of(base: Base, tokenizer: PreTrainedTokenizerBase, pictures: ProcessorPictures | None = None) -> Voice:
    """How such a model is asked: an encoder reads the whole text as it is, whose positions bound it."""
    if usual_class(base.config).auto_class == SEQ2SEQ_CLASS:
        return Voice(tokenizer, None, SourceTarget(tokenizer, TwoTexts()), LARGEST_COUNT)
    voice = Voice.of_tokenizer(tokenizer, pictures=pictures)
    if pictures is not None or voice.chats is None or not reads_images(base.config) or _takes_strings(voice.chats):
        return voice
    return Voice.of_tokenizer(tokenizer, pictures=open_pictures(base))


def _takes_strings(chats: ChatRenderer) -> bool:
    """Whether the template writes contents that are strings; models that see may have one for lists of parts alone."""
    try:
        return bool(chats.prompt_ids([{"role": "user", "content": "q"}]))
    except RenderError:
        return False


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
    voice = _voice_of(base, tokenizer)
    dtype = getattr(torch, noted) if noted in NOTED_DTYPES else torch_dtype(main_dtype(read_index(base.path)))

    def load_base() -> Engine:
        model = _load_base(base, section, dtype, reporter, usual_class(base.config), quantised=recorded_linears(used))
        return Engine(model, tokenizer, base=base, quantization=kind, reader=voice.pictures)

    return Answerer(voice, base, kind, load_base, saved.path, reporter)


def _load_base(
    base: Base,
    section: QuantizationSection,
    dtype: torch.dtype,
    reporter: Reporter,
    model_class: ModelClass,
    device: str | None = None,
    quantised: Collection[str] | None = None,
) -> PreTrainedModel:
    """A base of which no run says how it was computed: in one dtype throughout, by the model's usual attention."""
    return load_model(
        base,
        quantization=section,
        dtype=dtype,
        compute_dtype=dtype,
        attention="auto",
        device=device or read_device().kind,
        model_class=model_class,
        quantised=quantised,
        reporter=reporter,
    )


def _only_text(prompt: Sample) -> str:
    turns = prompt.turns
    if len(turns) != 1 or turns[0]["role"] != "user" or prompt.tools:
        what = "this model answers text without a chat template, and the prompt is a chat"
        raise DataError(what, todo="give one text a row: prompt, or a single turn of the user")
    return str(turns[0]["content"])
