"""What a BatchedEngine is asked and gives back: a request, its ticket, the pieces of the answer as they are made;
and its figures."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lorafit.answering.sampling import GREEDY, Sampling
from lorafit.errors import LorafitError

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """One prompt for a BatchedEngine.

    Attributes:
        prompt_ids: Token ids, generation prompt included.
        adapter: Name of the adapter that answers; None: the base model alone.
        sampling: How tokens are chosen, and how many at most; with its seed, an answer is a function of its request.
        stop_ids: Tokens that end the answer, beside the model's own.
        stop_strings: Texts that end the answer, and are no part of it.
        top_logprobs: How many of the likeliest tokens are told at each place, beside the chosen one's own
            log-probability; None: neither.
        counts: Whether it is one of the engine's figures; a look at its health is not.
        repeats: Whether it is one more answer to a prompt whose tokens are in the figures by another request.
    """

    prompt_ids: Sequence[int]
    adapter: str | None = None
    sampling: Sampling = GREEDY
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    top_logprobs: int | None = None
    counts: bool = True
    repeats: bool = False


@dataclass(frozen=True, slots=True)
class Written:
    """One token of an answer.

    Attributes:
        token_id: It. The last one of an answer may be a stop token.
        text: What of the answer's text is now certain: whole characters, and nothing that may begin a stop string. The
            texts of all pieces together are the answer.
        logprob: Its log-probability by the model's own logits, before temperature and top_p; None: not asked for.
        top_logprobs: The likeliest tokens at its place with theirs, likeliest first.
    """

    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Figures:
    """What a BatchedEngine does and has done, by adapter where that is told; None is the base alone.

    Attributes:
        running: Requests that are being answered.
        waiting: Requests that wait for room.
        reading: Of the running ones, those whose prompts are not read yet.
        still_seconds: Since a forward last ended, where anybody waits for one.
        prompt_tokens: Tokens of prompts that were read.
        written_tokens: Tokens that were written.
        finished: Requests that are over, by adapter and how they ended.
    """

    running: int
    waiting: int
    reading: int = 0
    still_seconds: float = 0.0
    prompt_tokens: dict[str | None, int] = field(default_factory=dict)
    written_tokens: dict[str | None, int] = field(default_factory=dict)
    finished: dict[tuple[str | None, str], int] = field(default_factory=dict)


class Ticket:
    """The answer to one request, read by one thread while the engine writes it.

    Args:
        request: What was asked.
        prompt_tokens: Tokens of the prompt, those that an adapter puts before it included.
        wake: Called in the engine's thread behind every piece and at the end; for whoever cannot wait in `read`.
    """

    def __init__(self, request: LiveRequest, prompt_tokens: int, wake: Callable[[], None] | None = None) -> None:
        self.request, self.prompt_tokens = request, prompt_tokens
        self.finish_reason: FinishReason | None = None
        self._wake = wake
        self._error: LorafitError | None = None
        self._pieces: queue.SimpleQueue[Written | None] = queue.SimpleQueue()
        self._cancelled, self._is_read = threading.Event(), False

    @property
    def adapter(self) -> str | None:
        """The name of the adapter that answers."""
        return self.request.adapter

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody called `cancel`."""
        return self._cancelled.is_set()

    def __iter__(self) -> Iterator[Written]:
        return self

    def __next__(self) -> Written:
        piece = self.read()
        if piece is None:
            raise StopIteration
        return piece

    def read(self, timeout_seconds: float | None = None) -> Written | None:
        """The next piece; None when there are no more.

        Args:
            timeout_seconds: How long it may take; 0: only what is there. None: for ever.

        Raises:
            TimeoutError: It took longer.
            LorafitError: The answer ended in an error.
        """
        piece = None
        if not self._is_read:
            try:
                piece = self._pieces.get(timeout_seconds != 0, timeout_seconds)
            except queue.Empty:
                raise TimeoutError from None
            self._is_read = piece is None
        if self._is_read and self._error is not None:
            raise self._error
        return piece

    def cancel(self) -> None:
        """Has the answer end at its next token; what it holds is freed then. More than once, or late, is no fault."""
        self._cancelled.set()

    def add(self, piece: Written) -> None:
        """Takes a piece from the engine."""
        self._pieces.put(piece)
        self._call_wake()

    def end(self, reason: FinishReason, error: LorafitError | None = None) -> None:
        """Takes the end from the engine."""
        self.finish_reason, self._error = reason, error
        self._pieces.put(None)
        self._call_wake()

    def _call_wake(self) -> None:
        if self._wake is None:
            return
        try:
            self._wake()
        except Exception:  # nobody is there any more: an event loop that was closed
            self.cancel()
