"""One answer as it is written: from the engine's thread into the server's event loop, which no ticket blocks."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from lorafit.serving.errors import shutting_down

if TYPE_CHECKING:
    from lorafit.answering.batched import BatchedEngine
    from lorafit.answering.ticket import LiveRequest, Written
    from lorafit.serving.metrics import Metrics


class Writing:
    """An answer that the engine writes; its work ends with the loop over the pieces, however that is left.

    Args:
        engine: Takes the request here.
        request: It.
        metrics: Counts the answer.

    Raises:
        LorafitError: The engine does not take it.
    """

    def __init__(self, engine: BatchedEngine, request: LiveRequest, metrics: Metrics) -> None:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        self._changed = changed
        self._metrics, self._began = metrics, time.perf_counter()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)  # holds no answer that nobody waits for

        self._ticket = engine.submit(request, wake)
        weakref.finalize(self, self._ticket.cancel)  # of a client that went before the loop began
        self.tokens = 0
        """Written so far."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._ticket.prompt_tokens

    @property
    def finish_reason(self) -> str:
        """`stop` or `length`, of an answer that has ended."""
        return str(self._ticket.finish_reason)

    def cancel(self) -> None:
        """The engine's work on it ends at the next token."""
        self._ticket.cancel()

    async def __aiter__(self) -> AsyncIterator[Written]:
        """Its pieces.

        Raises:
            ApiError: It was given up because the server ends.
            LorafitError: The engine's.
        """
        try:
            text = ""
            while (piece := await self._read()) is not None:
                text += piece.text
                if self.tokens == 0:
                    self._metrics.first_token(self._ticket.adapter, time.perf_counter() - self._began)
                self.tokens += 1
                yield piece
            if self._ticket.finish_reason == "cancelled":
                raise shutting_down()
            seconds = time.perf_counter() - self._began
            asked = None if self._ticket.request.repeats else self.prompt_tokens
            self._metrics.end(self._ticket.adapter, seconds, asked, self.tokens, text)
        finally:
            self.cancel()

    async def _read(self) -> Written | None:
        while True:
            try:
                return self._ticket.read(0)
            except TimeoutError:
                await self._changed.wait()
                self._changed.clear()
