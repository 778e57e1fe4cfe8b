"""What a server answers as: its base under its own name, and each adapter under the name it was given.

    name ──choose──> Served(adapter of the engine, voice) ──> how the request is rendered, and who answers

An adapter is asked through the tokenizer, template and system prompt that it was trained with, whatever those of the
base and of other adapters are. All must have one vocabulary, in which the engine decodes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.answering.opening import Answerer, Voice, open_answerer, open_plain_model
from lorafit.contracts import JsonObject, Reporter, Sample
from lorafit.errors import DataError, ModelError, UsageError
from lorafit.files.portable import is_local_path
from lorafit.model.adapter import AdapterFolder, read_adapter
from lorafit.model.base import Base, is_gguf, read_base, resolve_base
from lorafit.recipe.schema import ModelSection
from lorafit.run.workspace import check_answerable, is_lone_adapter, is_model, open_run
from lorafit.serving.errors import unknown_model
from lorafit.serving.split import NAME as SPLIT_NAME
from lorafit.serving.split import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafit.answering.batched import BatchedEngine

_TEMPLATE = "chat_template.jinja"
_RUNS_ADAPTER = "adapter"


@dataclass(frozen=True)
class Served:
    """One name that clients may ask for.

    Attributes:
        name: It.
        adapter: What the engine calls the adapter; None: the base answers.
        voice: How it is asked.
        kind: Of an adapter; empty for the base.
        root: Where it lies.
        parent: Of an adapter, the name of its base.
        created: When it was loaded, in seconds since 1970.
    """

    name: str
    adapter: str | None
    voice: Voice
    kind: str
    root: str
    parent: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True)
class Opened:
    """What a server is to serve, no weight loaded.

    Attributes:
        base: The base.
        name: What it is called.
        voice: How the base is asked.
        first: Says how the base is loaded: as for the first adapter.
        adapters: By name.
    """

    base: Base
    name: str
    voice: Voice
    first: Answerer
    adapters: Mapping[str, Answerer]


def open_served(
    base: str,
    given: Mapping[str, Path],
    split: Split | None,
    checkpoint: str | None,
    base_model: str | None,
    reporter: Reporter,
) -> Opened:
    """A base with adapters, found and checked as far as that goes without their weights.

    Args:
        base: A run, an adapter or a model folder, a .gguf file or a hub id.
        given: Folders of adapters or runs by name.
        split: Of users over some of these names and the base's.
        checkpoint: Of a run: which adapter.
        base_model: Of a run or an adapter: where its base is.
        reporter: Told about what is looked for.

    Raises:
        UsageError: A name is taken twice, or the split's is nobody's.
        LorafitError: What `open_answerer` says.
    """
    path, adapters = Path(base).expanduser(), dict[str, Answerer]()
    if path.exists() and not is_model(path) and not is_gguf(base):
        name = _name_of(path)
        if name in given:
            raise UsageError(f"'{name}' is served already", key="--adapter", todo="give the other another name")
        adapters[name] = _checked(open_answerer(path, checkpoint, base_model, reporter))
        found = adapters[name].base
    else:
        if checkpoint is not None or base_model is not None:
            key = "--checkpoint" if checkpoint is not None else "--base-model"
            raise UsageError("a base has none", key=key, todo="leave it out, or serve a run")
        found = resolve_base(ModelSection(base=base), Path.cwd(), reporter)
    for name, folder in given.items():
        adapters[name] = _open_adapter(folder, found, _tokenizers(adapters.values()), reporter)
    plain = open_plain_model(found.path, reporter)
    called = _base_name(next((one.base for one in adapters.values() if one.card is not None), found))
    for name in split.shares if split is not None else ():
        if name not in (called, *adapters):
            raise UsageError(f"'{name}' is not served", key="--split", todo=f"served: {', '.join((called, *adapters))}")
    if split is not None and SPLIT_NAME in (called, *adapters):
        todo = "give it another name"
        raise UsageError(f"'{SPLIT_NAME}' is the name of the split", key="--adapter", todo=todo)
    if called in adapters:
        raise UsageError(f"the base is called '{called}' too", key="--adapter", todo="give the adapter another name")
    first = next(iter(adapters.values()), plain)
    for served in (plain, *adapters.values()):
        _require_decoder(served.voice)
    return Opened(found, called, plain.voice, first, adapters)


def _base_name(base: Base) -> str:
    """What it was trained on as: a hub id, a folder's or file's name."""
    origin = base.origin
    return Path(origin.name).stem if origin.kind in ("package", "gguf") else origin.name


def _tokenizers(answerers: Iterable[Answerer]) -> dict[str, PreTrainedTokenizerBase]:
    """By their hash, so that adapters of one tokenizer share it."""
    return {one.card.tokenizer: one.voice.tokenizer for one in answerers if one.card is not None}


def _name_of(path: Path) -> str:
    """A run's folder; of a lone adapter its own, or that of its run where it is only called `adapter`."""
    folder = path.resolve() if is_lone_adapter(path) else open_run(path).run.root.resolve()
    return folder.parent.name if folder.name == _RUNS_ADAPTER else folder.name


def _require_decoder(voice: Voice) -> None:
    if voice.apart is not None:
        raise ModelError("an encoder-decoder is not served", todo="ask it with lorafit generate")


def _open_adapter(
    folder: Path, base: Base, known: Mapping[str, PreTrainedTokenizerBase], reporter: Reporter
) -> Answerer:
    """An adapter on that base, and no other. Raises what a client or user is told."""
    check_answerable(folder, None)
    if is_model(folder):
        raise UsageError("is a whole model, no adapter", file=str(folder), todo="name an adapter folder or a run")
    answerer = _checked(open_answerer(folder, None, str(base.path), reporter, known))
    if answerer.card is None:
        _check_named_base(answerer, base)
    return answerer


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


class Catalog:
    """What is served at present. Names may come and go in any thread.

    Args:
        engine: Answers; its base is loaded.
        opened: What to serve; its adapters are loaded here.
        split: Who answers for the model `split`; None: nobody is called so.
        reporter: Warned of adapters without effect.

    Raises:
        LorafitError: An adapter cannot be loaded.
    """

    def __init__(self, engine: BatchedEngine, opened: Opened, split: Split | None, reporter: Reporter) -> None:
        self._engine, self._base, self._reporter = engine, opened.base, reporter
        self._quantization, self._known = opened.first.quantization, _tokenizers(opened.adapters.values())
        self._tokenizer = opened.first.voice.tokenizer
        root = opened.base.reference[0]
        self.base = Served(opened.name, None, opened.voice, "", root)
        _check_vocabulary(opened.voice.tokenizer, self._tokenizer, root)
        self._served, self._lock = {opened.name: self.base}, threading.Lock()
        for name, answerer in opened.adapters.items():
            self._add(name, answerer)
        self.split = split

    def choose(self, name: str | None, user: str | None = None) -> Served:
        """Who answers a request. The one place where that is decided.

        Args:
            name: The request's `model`; None: the first adapter, or the base where there is none.
            user: Whom the request is for.

        Raises:
            ApiError: Nobody is called so.
        """
        served = self._served
        if self.split is not None and name == SPLIT_NAME:
            name = self.split.pick(user)
        found = list(served.values())[:2][-1] if name is None else served.get(name)
        if found is None:
            raise unknown_model(str(name), list(served))
        return found

    def all(self) -> list[Served]:
        """The base, then the adapters in the order in which they came."""
        return list(self._served.values())

    def load(self, name: str, folder: Path) -> Served:
        """Serves one more adapter.

        Raises:
            UsageError: The name is taken.
            LorafitError: It is none, is broken, or fits another base, vocabulary or template.
        """
        with self._lock:
            if name in self._served:
                raise UsageError(f"'{name}' is served already", key="lora_name", todo="unload it, or take another name")
            return self._add(name, _open_adapter(folder, self._base, self._known, self._reporter))

    def unload(self, name: str) -> None:
        """Serves an adapter no more; returns when its last request is answered.

        Raises:
            ApiError: Nobody is called so.
            UsageError: It is the base.
        """
        with self._lock:
            served = self.choose(name)
            if served.adapter is None:
                raise UsageError("the base cannot be unloaded", key="lora_name", todo="name an adapter")
            if self.split is not None and name in self.split.shares:
                raise UsageError(f"'{name}' answers for the split", key="lora_name", todo="name another one")
            self._served = {key: value for key, value in self._served.items() if key != name}
            self._engine.unload_adapter(served.adapter)

    def listing(self) -> JsonObject:
        """As /v1/models lists everybody, the split last."""
        data = [self.to_json(served) for served in self.all()]
        if self.split is not None:
            data.append({**data[0], "id": SPLIT_NAME, "root": str(self.split), "parent": self.base.name})
        return {"object": "list", "data": data}

    def to_json(self, served: Served) -> JsonObject:
        """As /v1/models/NAME says it."""
        names = {"id": served.name, "object": "model", "created": served.created, "owned_by": "lorafit"}
        return {
            **names,
            "root": served.root,
            "parent": served.parent,
            "max_model_len": self._engine.room(0, served.adapter),
        }

    def _add(self, name: str, answerer: Answerer) -> Served:
        saved = _saved(answerer)
        place = str(saved.path)
        _require_decoder(answerer.voice)
        _check_vocabulary(answerer.voice.tokenizer, self._tokenizer, place)
        trained_on = (saved.quantization() or {}).get("kind")
        if trained_on not in (None, self._quantization):
            what = f"trained on a base in {trained_on}, and this one is loaded in {self._quantization}"
            raise ModelError(what, file=place, todo="serve it by a server of its own")
        self._engine.load_adapter(name, saved.path, self._reporter)
        kind = str(saved.config["peft_type"]).lower() if answerer.card is None else answerer.card.adapter.kind
        served = Served(name, name, answerer.voice, kind, place, self.base.name)
        self._served = {**self._served, name: served}
        return served


def _check_vocabulary(theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase, place: str) -> None:
    """Raises ModelError where a token has another number than in the engine's tokenizer, which decodes answers."""
    if theirs is ours:
        return
    known = ours.get_vocab()
    unlike = [token for token, number in theirs.get_vocab().items() if known.get(token) != number]
    if unlike:
        what = f"its vocabulary is another one: {len(unlike)} of its tokens have no or another number here"
        raise ModelError(what, file=place, todo="serve it by a server of its own")
