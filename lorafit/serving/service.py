"""A server's work without its HTTP: prompts to tokens, requests to the engine, health, an end that waits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from lorafit.answering.sampling import GREEDY, Sampling
from lorafit.answering.ticket import LiveRequest, Written
from lorafit.contracts import Reporter, Sample
from lorafit.data.plain_text import PlainText
from lorafit.errors import LorafitError, QueueFull
from lorafit.serving.catalog import Catalog, Served
from lorafit.serving.errors import ApiError, as_api_error, shutting_down
from lorafit.serving.feedback import Feedback
from lorafit.serving.metrics import Metrics
from lorafit.serving.settings import Settings
from lorafit.serving.writing import Writing

if TYPE_CHECKING:
    from lorafit.answering.batched import BatchedEngine

Made = TypeVar("Made")
_HEALTH_SECONDS = 30.0
_PROBE = LiveRequest([0], None, replace(GREEDY, max_new_tokens=1), counts=False)
_LOOK_SECONDS = 0.02
_CHARACTERS_A_TOKEN = 32
"""More than those of any text's average; what is longer is refused before a minute goes into its tokens."""


@dataclass(frozen=True)
class Order:
    """How answers are wanted.

    Attributes:
        sampling: Makes the sampling of an answer of at most so many tokens.
        longest: Tokens of the longest answer; None: the server's own bound.
        stops: Texts that end an answer.
        top_logprobs: See `LiveRequest`.
        choices: Answers to each prompt, each with a seed of its own.
        asked_by, bounded_by: The request's fields that hold the prompt and the longest answer.
    """

    sampling: Callable[[int], Sampling]
    longest: int | None = None
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None
    choices: int = 1
    asked_by: str = "messages"
    bounded_by: str = "max_tokens"


class Service:
    """What the routes ask.

    Args:
        engine: Answers.
        catalog: Who is served.
        settings: Bounds.
        feedback: Takes ratings; None: nobody does.
        reporter: Gets a line for each request.

    Attributes:
        failed: See `BatchedEngine`.
        cut: Requests that were running when the grace was over.
        is_closing: Whether new requests are turned away.
        running: Requests that are being answered.
    """

    def __init__(
        self,
        engine: BatchedEngine,
        catalog: Catalog,
        settings: Settings,
        feedback: Feedback | None,
        reporter: Reporter,
    ) -> None:
        self._engine, self.catalog, self.settings, self.reporter = engine, catalog, settings, reporter
        self.failed = engine.failed
        self.feedback = feedback
        self.metrics = Metrics(engine, catalog.base.name)
        if catalog.router is not None:
            self.metrics.register(catalog.router)
        self._renders = ThreadPoolExecutor(1, "lorafit serve prompts")  # tokenizers are not for several threads
        self._probe: asyncio.Task[None] | None = None
        self.is_closing, self.running, self.cut, self._rendering = False, 0, 0, 0

    def bound(self, *texts: str, answers: int = 1, asked_by: str = "messages") -> None:
        """Looks at a request before any work goes into it, for which others would wait.

        Args:
            texts: Its prompts.
            answers: How many it asks for.
            asked_by: See `Order`.

        Raises:
            ApiError: A text is longer than any prompt, or more answers are asked for than may ever wait.
        """
        most, room = self._engine.limits.waiting, self._engine.room(0)
        if answers > most:  # 429 would have the client ask again for ever
            raise ApiError(400, f"{answers} answers in one request; at most {most} may wait here", param="n")
        longest = max(map(len, texts), default=0)
        if longest > room * _CHARACTERS_A_TOKEN:
            what = f"the longest prompt with its answer is {room:,} tokens here, and a text of {longest:,} characters "
            raise ApiError(400, f"{what}is more; shorten it", param=asked_by, code="context_length_exceeded")

    async def ask(self, served: Served, sample: Sample) -> list[int]:
        """The tokens of a chat or prompt, as training rendered what stood before an answer."""
        return await self._render(lambda: served.voice.prompt_ids(sample))

    async def read(self, served: Served, text: str) -> list[int]:
        """The tokens of a text as it is."""
        return await self._render(lambda: PlainText(served.voice.tokenizer).prompt_ids(text))

    def write(self, served: Served, prompts: Sequence[Sequence[int]], order: Order) -> list[Writing]:
        """Has all choices of all prompts written, or none.

        Raises:
            ApiError: A prompt is too long, too many requests wait, or the engine refuses it.
        """
        writings: list[Writing] = []
        try:
            for prompt in prompts:
                sampling = order.sampling(self._longest(served, len(prompt), order))
                for choice in range(order.choices):
                    own = replace(sampling, seed=sampling.seed + choice)
                    stop_ids = _stop_ids(served)
                    told = stop_ids, order.stops, order.top_logprobs
                    asked = LiveRequest(prompt, served.adapter, own, *told, repeats=choice > 0)
                    writings.append(Writing(self._engine, asked, self.metrics))
            self.catalog.require(served)  # unloaded meanwhile; another one may have its name, whose template is another
        except Exception as error:
            for writing in writings:
                writing.cancel()
            if not self.is_closing:
                self.catalog.require(served)
            raise (shutting_down() if self.is_closing else as_api_error(error)) from error
        return writings

    async def follow(self, writings: Sequence[Writing]) -> AsyncIterator[tuple[int, Written | None]]:
        """Pieces of all answers as they come, each with its answer's number; None at the end of one.

        Raises:
            ApiError: It takes longer than the server gives an answer; or one ended in an error.
        """
        pieces: asyncio.Queue[tuple[int, Written | Exception | None]] = asyncio.Queue()

        async def pump(number: int, writing: Writing) -> None:
            try:
                async for piece in writing:
                    pieces.put_nowait((number, piece))
                pieces.put_nowait((number, None))
            except Exception as error:  # raised again where the pieces are read
                pieces.put_nowait((number, error))

        until, going = asyncio.get_running_loop().time() + self.settings.timeout_seconds, len(writings)
        pumps = [asyncio.create_task(pump(number, writing)) for number, writing in enumerate(writings)]
        try:
            while going:
                async with asyncio.timeout_at(until):  # wait_for forgets a cancellation that comes beside a piece
                    number, piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise as_api_error(piece) from piece
                going -= piece is None
                yield number, piece
                await asyncio.sleep(0)  # of many that are there at once: others have their turn
        except TimeoutError:
            what = f"not answered within {self.settings.timeout_seconds:g} seconds; ask for fewer tokens, or later"
            raise ApiError(504, what, code="timeout") from None
        finally:
            for task in pumps:
                task.cancel()
            for writing in writings:
                writing.cancel()

    async def check_health(self) -> None:
        """Has the base write one token, where nobody else is answered; several who ask at once wait for the same one.

        Raises:
            ApiError: No forward ends, a token could not be written, or the server is ending.
        """
        if self.is_closing:
            raise shutting_down()
        try:
            self._require_steps()
            if self._probe is None or self._probe.done():
                self._probe = asyncio.create_task(self._write_one())
            await asyncio.shield(self._probe)
        except LorafitError as error:
            raise ApiError(503, error.one_line) from error

    async def _write_one(self) -> None:
        figures = self._engine.figures()
        if figures.running or figures.waiting:  # they get their tokens, or their prompts are read
            return
        ticket = self._engine.submit(_PROBE)
        try:
            while ticket.finish_reason is None:
                await asyncio.sleep(_LOOK_SECONDS)
                self._require_steps()
            ticket.read(0)
        finally:
            ticket.cancel()

    def _require_steps(self) -> None:
        """Raises ApiError where requests wait, and no forward has ended for too long; one over a prompt may take as
        long as an answer.
        """
        figures = self._engine.figures()
        most = self.settings.timeout_seconds if figures.reading else _HEALTH_SECONDS
        if figures.still_seconds > most:
            raise ApiError(503, f"no token was written within {most:g} seconds")

    async def drain(self) -> None:
        """Turns new requests away, lets running ones end within the grace, and gives up what is left."""
        self.is_closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.grace_seconds):
                while self.running:
                    await asyncio.sleep(_LOOK_SECONDS)
        self.cut = self.running
        close = partial(self._engine.close, finish=False)
        with ThreadPoolExecutor(1) as own:  # asyncio's threads may all wait for answers that close ends
            await asyncio.get_running_loop().run_in_executor(own, close)

    def _longest(self, served: Served, prompt_tokens: int, order: Order) -> int:
        """Tokens of the longest answer to a prompt. Raises ApiError where there is no room for it."""
        room, wanted = self._engine.room(prompt_tokens, served.adapter), order.longest
        if room < (wanted or 1):
            asked = "" if wanted is None else f" and {wanted:,} of the answer"
            what = f"the longest prompt with its answer is {room + prompt_tokens:,} tokens here; these are "
            what += f"{prompt_tokens:,} of the prompt{asked}; shorten the prompt or ask for fewer"
            param = order.asked_by if room < 1 else order.bounded_by
            raise ApiError(400, what, param=param, code="context_length_exceeded")
        return wanted or min(room, self.settings.max_new_tokens)

    async def _render(self, work: Callable[[], Made]) -> Made:
        if self._rendering >= (most := self._engine.limits.waiting):
            raise as_api_error(QueueFull(f"{most} prompts wait to be read, the most that may", todo="ask again later"))
        self._rendering += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._renders, work)
        finally:
            self._rendering -= 1


def _stop_ids(served: Served) -> tuple[int, ...]:
    """Tokens that end an answer: its template's, and the end token of the tokenizer that it was trained with."""
    end = served.voice.tokenizer.eos_token_id
    return (*served.voice.stop_ids, *([] if end is None else [int(end)]))
