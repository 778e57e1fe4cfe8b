"""Answers in OpenAI's forms, whole and in chunks.

pieces ──Choice──> text, calls of tools, log-probabilities ──ChatForm, TextForm──> JSON
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lorafit.contracts import JsonObject
from lorafit.serving.tool_calls import CallReader

if TYPE_CHECKING:
    from lorafit.answering.ticket import Written
    from lorafit.serving.writing import Writing

Decode = Callable[[int], str]


class Choice:
    """One answer, as far as it is written.

    Args:
        writing: The engine's.
        reader: Takes calls of tools out of its text; None where none are looked for.
    """

    def __init__(self, writing: Writing, reader: CallReader | None = None) -> None:
        self._writing, self._reader = writing, reader
        self.pieces: list[Written] = []
        self.text = ""

    @property
    def calls(self) -> list[JsonObject]:
        """Of tools."""
        return [] if self._reader is None else self._reader.calls

    @property
    def finish_reason(self) -> str:
        """Why it ended: `stop`, `length` or `tool_calls`."""
        return "tool_calls" if self.calls else self._writing.finish_reason

    def add(self, piece: Written) -> str:
        """Takes a piece; gives the text that may be shown now."""
        self.pieces.append(piece)
        return self._shown(piece.text if self._reader is None else self._reader.add(piece.text))

    def end(self) -> str:
        """The text that was held back until its end was known."""
        return self._shown("" if self._reader is None else self._reader.end())

    def _shown(self, text: str) -> str:
        self.text += text
        return text


class Form(ABC):
    """The form of one kind of answer.

    Args:
        model: Who answers.
        writings: The engine's answers, those to one prompt behind each other.
        choices: The same as they are shown.
        prompts: How many prompts they answer.
        decode: Text of a token; None where no log-probabilities are told.

    Attributes:
        id: By which the answer may be rated.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(
        self, model: str, writings: Sequence[Writing], choices: Sequence[Choice], prompts: int, decode: Decode | None
    ) -> None:
        self.model, self.writings, self.choices = model, writings, choices
        self._prompts, self._decode = prompts, decode
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model}

    @property
    def usage(self) -> JsonObject:
        """Tokens of prompts, each counted once, and of answers."""
        each = len(self.writings) // self._prompts
        prompt = sum(writing.prompt_tokens for writing in self.writings[::each])
        written = sum(writing.tokens for writing in self.writings)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def whole(self) -> JsonObject:
        """The body of an answer that is over."""
        choices = [
            {"index": number, **self._whole(choice), "finish_reason": choice.finish_reason}
            for number, choice in enumerate(self.choices)
        ]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": self.usage}

    def chunks(self, number: int, piece: Written) -> list[JsonObject]:
        """A chunk with the next piece of an answer; none where there is nothing to tell."""
        choice = self.choices[number]
        text = choice.add(piece)
        if not (text or len(choice.pieces) == 1 or self._decode is not None):
            return []
        return [self._chunk({"index": number, **self._part(choice, text), "finish_reason": None})]

    def last_chunks(self, number: int) -> list[JsonObject]:
        """What is told at the end of an answer: text that was held back, calls, and why it ended."""
        choice = self.choices[number]
        rest = self._rest(choice.end(), choice.calls)
        parts = [{"index": number, **part, "finish_reason": None} for part in rest[:-1]]
        parts.append({"index": number, **rest[-1], "finish_reason": choice.finish_reason})
        return [self._chunk(part) for part in parts]

    def usage_chunk(self) -> JsonObject:
        """The chunk behind all others, for clients who ask for it."""
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": self.usage}

    def _chunk(self, choice: JsonObject) -> JsonObject:
        return {**self._head, "object": self.chunk_object, "choices": [choice]}

    def rows(self) -> list[JsonObject]:
        """Each choice with what was asked, as a row that waits for a verdict; none where no row can be made of it."""
        return []

    @abstractmethod
    def _whole(self, choice: Choice) -> JsonObject:
        """A choice without number and reason."""

    @abstractmethod
    def _part(self, choice: Choice, text: str) -> JsonObject:
        """The same of its newest piece, with the text that may be shown now."""

    @abstractmethod
    def _rest(self, text: str, calls: list[JsonObject]) -> list[JsonObject]:
        """The same of the end, in one part or more."""


class ChatForm(Form):
    """Of /v1/chat/completions.

    Args:
        model, writings, choices, decode: See `Form`.
        asked: Turns and tools, as a row names them.
    """

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        model: str,
        writings: Sequence[Writing],
        choices: Sequence[Choice],
        decode: Decode | None,
        asked: JsonObject,
    ) -> None:
        super().__init__(model, writings, choices, 1, decode)
        self._asked = asked

    def rows(self) -> list[JsonObject]:
        """See `Form`."""
        return [{**self._asked, "completion": [self.turn(choice)], "model": self.model} for choice in self.choices]

    @staticmethod
    def turn(choice: Choice) -> JsonObject:
        """A choice as a turn of the assistant."""
        if not choice.calls:
            return {"role": "assistant", "content": choice.text}
        return {"role": "assistant", "content": choice.text or None, "tool_calls": choice.calls}

    def _whole(self, choice: Choice) -> JsonObject:
        return {"message": {**self.turn(choice), "refusal": None}, "logprobs": self._logprobs(choice.pieces)}

    def _part(self, choice: Choice, text: str) -> JsonObject:
        delta = {"role": "assistant", "content": text} if len(choice.pieces) == 1 else {"content": text}
        return {"delta": delta, "logprobs": self._logprobs(choice.pieces[-1:])}

    def _rest(self, text: str, calls: list[JsonObject]) -> list[JsonObject]:
        deltas: list[JsonObject] = [{"content": text}] if text else []
        if calls:
            deltas.append({"tool_calls": [{"index": number, **call} for number, call in enumerate(calls)]})
        return [{"delta": delta} for delta in [*deltas, {}]]

    def _logprobs(self, pieces: Sequence[Written]) -> JsonObject | None:
        if self._decode is None:
            return None
        told = []
        for piece in pieces:
            top = [self._token(number, logprob) for number, logprob in piece.top_logprobs]
            told.append({**self._token(piece.token_id, piece.logprob), "top_logprobs": top})
        return {"content": told, "refusal": None}

    def _token(self, number: int, logprob: float | None) -> JsonObject:
        assert self._decode is not None, "asked for"
        text = self._decode(number)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class TextForm(Form):
    """Of /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _whole(self, choice: Choice) -> JsonObject:
        return {"text": choice.text, "logprobs": self._logprobs(choice.pieces, 0)}

    def _part(self, choice: Choice, text: str) -> JsonObject:
        return {"text": text, "logprobs": self._logprobs(choice.pieces[-1:], len(choice.text) - len(text))}

    def _rest(self, text: str, calls: list[JsonObject]) -> list[JsonObject]:
        return [{"text": text, "logprobs": None}]

    def _logprobs(self, pieces: Sequence[Written], offset: int) -> JsonObject | None:
        decode = self._decode
        if decode is None:
            return None
        tokens, offsets = [decode(piece.token_id) for piece in pieces], []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [piece.logprob for piece in pieces],
            "top_logprobs": [{decode(number): value for number, value in piece.top_logprobs} for piece in pieces],
            "text_offset": offsets,
        }
