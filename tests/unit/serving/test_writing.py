"""An answer's pieces come from the engine's thread into the event loop, and its work ends when nobody waits for it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from lorafit.answering.ticket import LiveRequest, Ticket, Written
from lorafit.errors import NumericsError
from lorafit.serving.errors import ApiError
from lorafit.serving.writing import Writing


class Engine:
    """Takes requests and keeps their tickets, which the test writes to."""

    def submit(self, request: LiveRequest, wake: Any) -> Ticket:
        self.ticket = Ticket(request, len(request.prompt_ids), wake)
        return self.ticket


class Metrics:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def first_token(self, adapter: str | None, seconds: float) -> None:
        self.told.append("first")

    def end(self, adapter: str | None, seconds: float, prompt_tokens: int, tokens: int, text: str) -> None:
        self.told.append((adapter, prompt_tokens, tokens, text))


def begin() -> tuple[Writing, Ticket, Metrics]:
    engine, metrics = Engine(), Metrics()
    writing = Writing(engine, LiveRequest([1, 2], "a"), metrics)  # type: ignore[arg-type]
    return writing, engine.ticket, metrics


def test_pieces_of_another_thread_arrive_in_order() -> None:
    async def read() -> None:
        writing, ticket, metrics = begin()

        def write() -> None:
            for number in range(50):
                ticket.add(Written(number, f"{number} "))
            ticket.end("length")

        threading.Thread(target=write).start()
        found = [piece.token_id async for piece in writing]
        assert found == list(range(50)) and writing.tokens == 50 and writing.finish_reason == "length"
        assert metrics.told == ["first", ("a", 2, 50, "".join(f"{number} " for number in range(50)))]

    asyncio.run(read())


def test_the_work_ends_where_the_loop_is_left_or_never_begins() -> None:
    async def leave() -> None:
        writing, ticket, metrics = begin()
        ticket.add(Written(1, "a"))
        async for _ in writing:
            break
        await asyncio.sleep(0.05)  # the event loop closes what was left
        del writing
        assert ticket.is_cancelled and metrics.told == ["first"]
        unread, ticket, _ = begin()
        assert not ticket.is_cancelled
        del unread
        assert ticket.is_cancelled

    asyncio.run(leave())


def test_how_an_answer_can_fail() -> None:
    async def fail() -> None:
        writing, ticket, metrics = begin()
        ticket.end("cancelled")
        with pytest.raises(ApiError) as given_up:
            _ = [piece async for piece in writing]
        assert given_up.value.status == 503
        writing, ticket, metrics = begin()
        ticket.end("error", NumericsError("logits are no numbers"))
        with pytest.raises(NumericsError):
            _ = [piece async for piece in writing]
        assert metrics.told == []

    asyncio.run(fail())
