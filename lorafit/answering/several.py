"""A base and the adapters that stand over it, found, checked against it and named before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.answering.opening import Answerer, Voice, open_answerer, open_plain_model
from lorafit.contracts import Reporter, Sample
from lorafit.errors import DataError, ModelError, UsageError
from lorafit.files.portable import is_local_path
from lorafit.model.adapter import AdapterFolder, read_adapter
from lorafit.model.base import Base, base_text, is_gguf, read_base, resolve_unrecorded
from lorafit.run.workspace import check_answerable, is_lone_adapter, is_model, open_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEMPLATE = "chat_template.jinja"
_RUNS_ADAPTER = "adapter"
BASE = "base"
"""What a base is called where an adapter has its name."""


@dataclass(frozen=True)
class Opened:
    """A base and its adapters, no weight loaded.

    Attributes:
        base: The base.
        name: What it is called: as it was trained on, or `base` where an adapter is called so.
        voice: How the base is asked.
        first: Says how the base is loaded: as for the first adapter.
        adapters: By name.
    """

    base: Base
    name: str
    voice: Voice
    first: Answerer
    adapters: Mapping[str, Answerer]


def open_several(
    base: str, given: Mapping[str, Path], checkpoint: str | None, base_model: str | None, reporter: Reporter
) -> Opened:
    """A base with adapters, found and checked as far as that goes without their weights.

    Args:
        base: A run, an adapter or a model folder, a .gguf file or a hub id.
        given: Folders of adapters or runs by name.
        checkpoint: Of a run: which adapter.
        base_model: Of a run or an adapter: where its base is.
        reporter: Told about what is looked for.

    Raises:
        UsageError: A name is taken twice.
        LorafitError: What `open_answerer` says.
    """
    base = base_text(base)
    path, adapters = Path(base).expanduser(), dict[str, Answerer]()
    for folder in given.values():
        check_answerable(folder, None)
    if not path.exists() and not is_gguf(base):
        _refuse_slip(path)
    own = open_answerer(path, checkpoint, base_model, reporter) if path.exists() and not is_gguf(base) else None
    if own is not None and own.folder is not None:
        if (name := _name_of(path)) in given:
            raise UsageError(f"two are called '{name}'", key="--adapter", todo="give the other another name")
        adapters[name], found = _checked(own), own.base
    elif checkpoint is not None or base_model is not None:
        key = "--checkpoint" if checkpoint is not None else "--base-model"
        raise UsageError("a base has none", key=key, todo="leave it out, or name a run")
    else:
        found = resolve_unrecorded(base, reporter)
    for name, folder in given.items():
        adapters[name] = open_on_base(folder, found, tokenizers_of(adapters.values()), reporter)
    plain = open_plain_model(found.path, reporter)
    called = _base_name(next((one.base for one in adapters.values() if one.card is not None), found))
    called = BASE if called in adapters else called
    return Opened(found, called, plain.voice, next(iter(adapters.values()), plain), adapters)


def _refuse_slip(path: Path) -> None:
    """A name that was meant for something on this disk; else the hub would be asked for it."""
    try:
        check_answerable(path, None)
    except UsageError as error:
        is_path = is_local_path(str(path)) or len(path.parts) > 2 or (path.parent != Path() and path.parent.is_dir())
        if (error.todo or "").startswith("did you mean") or is_path:
            raise


def tokenizers_of(answerers: Iterable[Answerer]) -> dict[str, PreTrainedTokenizerBase]:
    """By their hash, so that adapters of one tokenizer share it."""
    return {one.card.tokenizer: one.voice.tokenizer for one in answerers if one.card is not None}


def open_on_base(
    folder: Path, base: Base, known: Mapping[str, PreTrainedTokenizerBase], reporter: Reporter
) -> Answerer:
    """An adapter on that base, and no other. Raises what a client or user is told.

    `known`: from `tokenizers_of`.
    """
    check_answerable(folder, None)
    if is_model(folder):
        raise UsageError("is a whole model, no adapter", file=str(folder), todo="name an adapter folder or a run")
    answerer = _checked(open_answerer(folder, None, str(base.path), reporter, known))
    if answerer.card is None:
        _check_named_base(answerer, base)
    return answerer


def check_vocabulary(theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase, place: str) -> None:
    """Raises ModelError where a token has another number than in the engine's tokenizer, which decodes answers."""
    if theirs is ours:
        return
    known = ours.get_vocab()
    unlike = [token for token, number in theirs.get_vocab().items() if known.get(token) != number]
    if unlike:
        what = f"its vocabulary is another one: {len(unlike)} of its tokens have no or another number here"
        raise ModelError(what, file=place, todo="get its tokenizer files again, or load it by itself")


def _base_name(base: Base) -> str:
    """What it was trained on as: a hub id, a folder's or file's name."""
    origin = base.origin
    return Path(origin.name).stem if origin.kind in ("package", "gguf") else origin.name


def _name_of(path: Path) -> str:
    """A run's folder; of a lone adapter its own, or that of its run where it is only called `adapter`."""
    folder = path.resolve() if is_lone_adapter(path) else open_run(path).run.root.resolve()
    return folder.parent.name if folder.name == _RUNS_ADAPTER else folder.name


def _check_named_base(answerer: Answerer, base: Base) -> None:
    """Of an adapter without a digest: that the base which its config names is not known to be another one."""
    saved = _saved(answerer)
    named = str(saved.config.get("base_model_name_or_path") or "")
    other = base.origin.kind == "hub" and bool(named) and not is_local_path(named) and named != base.origin.name
    if named and is_model(Path(named)):
        other = read_base(Path(named)).origin.digest != base.origin.digest
    if other:
        what = f"trained on '{named[:80]}', but this base is '{base.shown}'"
        raise ModelError(what, file=str(saved.path), todo="use the base it was trained on")


def _saved(answerer: Answerer) -> AdapterFolder:
    assert answerer.folder is not None, "whole models are refused"
    return read_adapter(answerer.folder)


def _checked(answerer: Answerer) -> Answerer:
    """The same, whose template is the one that it was trained with, and renders a question. Raises ModelError."""
    assert answerer.folder is not None, "whole models are refused"
    file, card, voice = answerer.folder / _TEMPLATE, answerer.card, answerer.voice
    trained = None if card is None else card.shipped_templates.get("default")
    if trained is not None and file.is_file() and file.read_text(encoding="utf-8").strip() != trained.strip():
        todo = "restore the file, or remove it"
        raise ModelError("is not the chat template that the adapter was trained with", file=str(file), todo=todo)
    try:
        voice.prompt_ids(Sample("", 0, prompt="q"))
    except DataError as error:
        what = f"its chat template renders no question: {error.what}"
        raise ModelError(what, file=str(file), todo="use the template it was trained with") from error
    return answerer
