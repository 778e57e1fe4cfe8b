"""A chat with whoever of several speakers is chosen, all of them over one base in memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorafit.answering.generate import Answer, Request
from lorafit.answering.sampling import Sampling
from lorafit.chatting.conversation import Conversation, Exchange
from lorafit.console.arguments import ARGUMENTS, check_arguments
from lorafit.console.nearest import did_you_mean
from lorafit.console.wording import counted
from lorafit.contracts import JsonObject
from lorafit.errors import DataError, UsageError

if TYPE_CHECKING:
    from lorafit.answering.engine import Engine
    from lorafit.answering.opening import Voice

SETTINGS = ("temperature", "top_p", "max_new_tokens", "min_new_tokens", "no_repeat_ngram_size", "seed")


@dataclass(frozen=True)
class Speaker:
    """Who answers.

    Attributes:
        name: As the user calls it.
        adapter: As the engine calls it; None: the base alone.
        voice: How it is asked.
    """

    name: str
    adapter: str | None
    voice: Voice

    @property
    def habits(self) -> str:
        """What a user must know of one that does not chat; empty of one that does."""
        if self.voice.apart is not None:
            return f"{self.name} writes the target of each message by itself, and forgets earlier ones"
        if self.voice.chats is None:
            return (
                f"{self.name} knows no chats: it goes on with each message as verbatim text, and forgets earlier ones"
            )
        return ""


@dataclass(frozen=True)
class Said:
    """An answer that was given, as `--json` prints it."""

    speaker: str
    asked: str
    answer: str
    tokens: int
    ended: str
    seconds: float


class Chat:
    """The conversation, who answers, and how answers are chosen.

    Args:
        engine: Holds the base and every adapter.
        speakers: By name.
        first: Name of who answers first.
        sampling: How answers are chosen, until a setting is changed.

    Attributes:
        speaker: Who answers now.
        conversation: What was said, as far as it was not taken back.
        said: Every answer that was given.
    """

    def __init__(self, engine: Engine, speakers: Mapping[str, Speaker], first: str, sampling: Sampling) -> None:
        self._engine, self._speakers, self.speaker = engine, dict(speakers), speakers[first]
        self.sampling, self.conversation = sampling, Conversation()
        self.said: list[Said] = []
        self._answered: list[Request] = []

    @property
    def names(self) -> list[str]:
        """Of all speakers."""
        return list(self._speakers)

    def switch(self, name: str) -> None:
        """Another one answers from now on; the conversation stays."""
        if name not in self._speakers:
            todo = f"{did_you_mean(name, self._speakers)}here: {', '.join(self._speakers)}"
            raise UsageError(f"no adapter is called '{name[:60]}'", key="/adapter", todo=todo)
        self.speaker = self._speakers[name]

    def set_system(self, text: str | None) -> None:
        """Another system message for the whole conversation; None: the speaker's own."""
        before, self.conversation.system = self.conversation.system, text
        try:
            if self.speaker.voice.chats is None and text is not None:
                what = f"{self.speaker.name} knows no chat, so it reads no system message"
                raise UsageError(what, key="/system", todo="put the text into the message")
            self._ask("probe")
        except Exception:
            self.conversation.system = before
            raise

    def set(self, name: str, text: str) -> None:
        """Another way to choose answers.

        Args:
            name: One of `SETTINGS`.
            text: Its value as it was typed.
        """
        kind = int if float not in ARGUMENTS[name].types else float
        value: Any = text
        with contextlib.suppress(ValueError):  # said below
            value = kind(text)
        check_arguments({name: value})
        self.sampling = replace(self.sampling, **{name: value})

    def take_back(self) -> str:
        """The last message, which is no part of the conversation any more, and neither is its answer."""
        if not self.conversation.exchanges:
            raise UsageError("nothing was said yet", todo="write a message first")
        return self.conversation.exchanges.pop().asked

    def would_repeat(self, asked: str) -> bool:
        """Whether the answer to a message is known: chosen greedily, by the same speaker, behind the same turns."""
        return self.sampling.temperature == 0 and self._request(asked) in self._answered

    def answer(self, asked: str) -> Generator[str, None, Said]:
        """The answer's text as it is written.

        What was written stays in the conversation, also where nobody reads on. Where nothing was, and where the message
        cannot be answered, it is no part of the conversation.

        Raises:
            DataError: The template refuses the chat, or it fills the model's positions.
        """
        request = self._request(asked)
        self._engine.check_prompts([request.prompt_ids])
        began, written = time.perf_counter(), ""
        pieces, whole = self._engine.stream(request), None
        try:
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    whole = end.value
                    self._answered.append(request)
                    break
                written += piece
                yield piece
        finally:
            pieces.close()
            self._keep(asked, written, whole, time.perf_counter() - began)
        if whole.ended == "no_room":
            what = f"the conversation has {counted(len(request.prompt_ids), 'token')}, which fill the model's positions"
            todo = "take turns back with /undo, begin anew with /new, or write less; the message was taken back"
            raise DataError(what, todo=todo)
        return self.said[-1]

    def _keep(self, asked: str, written: str, whole: Answer | None, seconds: float) -> None:
        ended = "stopped" if whole is None else whole.ended
        if ended != "no_room":
            self.said.append(Said(self.speaker.name, asked, written, whole.tokens if whole else 0, ended, seconds))
        if written.strip():
            self.conversation.exchanges.append(Exchange(asked, written, ended == "stop"))

    def _request(self, asked: str) -> Request:
        row = len(self.said) if self.sampling.temperature > 0 else 0  # another draw each time
        return Request(self._ask(asked), self.speaker.adapter, self.sampling, self.speaker.voice.stop_ids, row)

    def _ask(self, asked: str) -> list[int]:
        return self.speaker.voice.prompt_ids(self.conversation.prompt(self.speaker.voice, asked))

    def rows(self) -> list[JsonObject]:
        """The conversation for training, in the form of who answers now."""
        return self.conversation.rows(self.speaker.voice)
