"""What a server answers as: its base under its own name, and each adapter under the name it was given.

    name ──choose──> Served(adapter of the engine, voice) ──> how the request is rendered, and who answers

An adapter is asked through the tokenizer, template and system prompt that it was trained with, whatever those of the
base and of other adapters are. All must have one vocabulary, in which the engine decodes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.answering.opening import Answerer, Voice
from lorafit.answering.several import Opened, check_vocabulary, open_on_base, open_several, tokenizers_of
from lorafit.contracts import JsonObject, Reporter
from lorafit.errors import ModelError, UsageError
from lorafit.model.adapter import read_adapter
from lorafit.serving.errors import ApiError, unknown_model
from lorafit.serving.routing import NAME as AUTO_NAME
from lorafit.serving.split import NAME as SPLIT_NAME
from lorafit.serving.split import Split

if TYPE_CHECKING:
    from lorafit.answering.batched import BatchedEngine
    from lorafit.serving.routing import Router


_UNROUTED = f"'{AUTO_NAME}' chooses an adapter by the prompt, on a server that was started with --route 0.9"


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


def open_served(
    base: str,
    given: Mapping[str, Path],
    split: Split | None,
    checkpoint: str | None,
    base_model: str | None,
    reporter: Reporter,
    *,
    routes: bool = False,
) -> Opened:
    """What `open_several` opens, where all of it can be served.

    Args:
        split: Of users over some of these names and the base's.
        routes: Whether somebody is to be chosen by prompts.

    Raises:
        UsageError: A name of the split is nobody's; or somebody has a name that is not to be had.
        ModelError: An encoder-decoder is among them, or the first adapter has another vocabulary than the base.
    """
    opened = open_several(base, given, checkpoint, base_model, reporter)
    if opened.name in opened.adapters:
        what = f"the base is called '{opened.name}' too"
        raise UsageError(what, key="--adapter", todo="give the adapter another name")
    names = (opened.name, *opened.adapters)
    for name in split.shares if split is not None else ():
        if name not in names:
            raise UsageError(f"'{name}' is not served", key="--split", todo=f"served: {', '.join(names)}")
    for taken, what, is_taken in (
        (SPLIT_NAME, "the split", split is not None),
        (AUTO_NAME, "the choice by prompts", routes),
    ):
        if is_taken and taken in names:
            raise UsageError(f"'{taken}' is the name of {what}", key="--adapter", todo="give it another name")
    for voice in (opened.voice, *(one.voice for one in opened.adapters.values())):
        _require_decoder(voice)
    if opened.first.folder is not None:  # answers are decoded by its tokenizer, the base's too
        check_vocabulary(opened.voice.tokenizer, opened.first.voice.tokenizer, str(opened.first.folder))
    return opened


def _require_decoder(voice: Voice) -> None:
    if voice.apart is not None:
        raise ModelError("an encoder-decoder is not served", todo="ask it with lorafit generate")


class Catalog:
    """What is served at present. Names may come and go in any thread.

    Args:
        engine: Answers; its base is loaded.
        opened: What to serve; its adapters are loaded here.
        split: Who answers for the model `split`; None: nobody is called so.
        reporter: Warned of adapters without effect.
        router: Learns all adapters here, and chooses who answers for the model `auto`; None: nobody is called so.

    Raises:
        LorafitError: An adapter cannot be loaded.
    """

    def __init__(
        self,
        engine: BatchedEngine,
        opened: Opened,
        split: Split | None,
        reporter: Reporter,
        router: Router | None = None,
    ) -> None:
        self._engine, self._base, self._reporter = engine, opened.base, reporter
        self._known = tokenizers_of(opened.adapters.values())
        self._tokenizer = opened.first.voice.tokenizer
        root = opened.base.reference[0]
        self.base = Served(opened.name, None, opened.voice, "", root)
        self._served, self._lock = {opened.name: self.base}, threading.Lock()
        for name, answerer in opened.adapters.items():
            self._add(name, answerer)
        self.split, self.router = split, router
        if router is not None:
            router.learn(
                {served.name: Path(served.root) for served in self.all() if served.adapter is not None}, draws=True
            )
            router.require_known()
        self._names = {SPLIT_NAME} if split is not None else set()
        self._names |= {AUTO_NAME} if self._routes else set()

    async def find(self, name: str | None, asked: str, user: str | None = None) -> Served:
        """Who answers a request: `choose`, and for `auto` the router, by what the user asks.

        Raises:
            ApiError: Nobody is called so.
            LorafitError: Too many prompts wait to be routed, or the engine is closed.
        """
        if self.router is None:
            return self.choose(name, user)
        if name == AUTO_NAME and self._routes:
            return self._served.get(await self.router.choose(asked) or self.base.name, self.base)
        served = self.choose(name, user)
        self.router.watch(served.adapter, asked)
        return served

    def text_of(self, ids: Sequence[int]) -> str:
        """What tokens say; those that there are not, nothing."""
        return str(self._tokenizer.decode([token for token in ids if 0 <= token < len(self._tokenizer)]))

    @property
    def _routes(self) -> bool:
        return self.router is not None and self.router.share is not None

    def choose(self, name: str | None, user: str | None = None) -> Served:
        """Who answers a request that no prompt decides.

        Args:
            name: The request's `model`; None: the first adapter, or the base where there is none.
            user: Whom the request is for.

        Raises:
            ApiError: Nobody is called so.
        """
        if self.split is not None and name == SPLIT_NAME:
            name = self.split.pick(user)
        return list(self._served.values())[:2][-1] if name is None else self._find(name)

    def require(self, served: Served) -> None:
        """Raises ApiError where it is not served any more; its name may be another one's by now."""
        if self._find(served.name) is not served:
            raise self._unknown(served.name, "model")

    def all(self) -> list[Served]:
        """The base, then the adapters in the order in which they came."""
        return list(self._served.values())

    def load(self, name: str, folder: Path) -> Served:
        """Serves one more adapter.

        Raises:
            UsageError: The name is taken.
            LorafitError: It is none, is broken, or fits another base, vocabulary or template.
        """
        if folder.suffix in (".yaml", ".yml") and not folder.is_dir():  # a recipe would lead to any other folder
            what = "is no folder; recipes are not followed here"
            raise UsageError(what, file=str(folder), todo="name an adapter folder or a run folder")
        with self._lock:
            if name in self._served or name in self._names:
                raise UsageError(f"'{name}' is served already", key="lora_name", todo="unload it, or take another name")
            served = self._add(name, open_on_base(folder, self._base, self._known, self._reporter))
            if self.router is not None:
                self.router.learn({name: Path(served.root)}, draws=False)  # not for a client
            return served

    def unload(self, name: str) -> None:
        """Serves an adapter no more; returns when its last request is answered.

        Raises:
            ApiError: Nobody is called so.
            UsageError: It is the base.
        """
        with self._lock:  # not while it waits: others come and go meanwhile
            served = self._find(name, "lora_name")
            if served.adapter is None:
                raise UsageError("the base cannot be unloaded", key="lora_name", todo="name an adapter")
            if self.split is not None and name in self.split.shares:
                raise UsageError(f"'{name}' answers for the split", key="lora_name", todo="name another one")
            self._served = {key: value for key, value in self._served.items() if key != name}
            if self.router is not None:
                self.router.forget(name)
        self._engine.unload_adapter(served.adapter)

    def listing(self) -> JsonObject:
        """As /v1/models lists everybody, names that stand for several last."""
        told = [self._told(served) for served in self.all()]
        return {"object": "list", "data": [*told, *map(self.to_json, sorted(self._names))]}

    def to_json(self, name: str) -> JsonObject:
        """As /v1/models/NAME says it.

        Raises:
            ApiError: Nobody is called so.
        """
        if name in self._names:
            root = str(self.split) if name == SPLIT_NAME else ",".join(self.router.names if self.router else ())
            return {**self.to_json(self.base.name), "id": name, "root": root, "parent": self.base.name}
        return self._told(self._find(name))

    def _find(self, name: str, param: str = "model") -> Served:
        served = self._served
        if name not in served:
            raise self._unknown(name, param)
        return served[name]

    def _unknown(self, name: str, param: str) -> ApiError:
        """What is told of a name that is nobody's; `param`: the field that holds it."""
        if param == "model" and name == AUTO_NAME and not self._routes:
            return ApiError(404, _UNROUTED, param=param, code="model_not_found")
        known = [*self._served, *(sorted(self._names) if param == "model" else ())]
        return unknown_model(name, known, param)

    def _told(self, served: Served) -> JsonObject:
        names = {"id": served.name, "object": "model", "created": served.created, "owned_by": "lorafit"}
        return {
            **names,
            "root": served.root,
            "parent": served.parent,
            "max_model_len": self._engine.room(0, served.adapter),
        }

    def _add(self, name: str, answerer: Answerer) -> Served:
        assert answerer.folder is not None, "whole models are refused"
        saved = read_adapter(answerer.folder)
        place = str(saved.path)
        _require_decoder(answerer.voice)
        check_vocabulary(answerer.voice.tokenizer, self._tokenizer, place)
        self._engine.load_adapter(name, saved.path, self._reporter)
        kind = str(saved.config["peft_type"]).lower() if answerer.card is None else answerer.card.adapter.kind
        served = Served(name, name, answerer.voice, kind, place, self.base.name)
        self._served = {**self._served, name: served}
        return served
