"""Who answers while adapters come and go, and an end that nobody can hold up."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorafit.answering.opening import Voice
from lorafit.answering.sampling import Sampling
from lorafit.answering.ticket import Figures, LiveRequest, Ticket, Written
from lorafit.contracts import Silent
from lorafit.errors import LorafitError, NumericsError, UsageError
from lorafit.serving import routes
from lorafit.serving.catalog import Catalog, Served
from lorafit.serving.errors import ApiError
from lorafit.serving.service import Order, Service
from lorafit.serving.settings import Settings
from tests.support.tiny_model import make_tokenizer


class Engine:
    """Takes every request; an unload waits until the engine is closed."""

    def __init__(self) -> None:
        self.limits, self.tickets = SimpleNamespace(waiting=8), list[Ticket]()
        self.closed, self.waits = threading.Event(), threading.Semaphore(0)
        self.failed: Future[None] = Future()
        self.told, self.adapters = Figures(0, 0), ("a0",)

    def figures(self) -> Figures:
        return self.told

    def room(self, prompt_tokens: int, adapter: str | None = None) -> int:
        return 100

    def submit(self, request: LiveRequest, wake: Any = None) -> Ticket:
        if self.failed.done():
            self.failed.result()
        self.tickets.append(Ticket(request, len(request.prompt_ids), wake))
        return self.tickets[-1]

    def load_adapter(self, name: str, folder: Path, reporter: Any) -> None: ...

    def unload_adapter(self, name: str) -> None:
        self.waits.release()
        assert self.closed.wait(20)
        raise UsageError("the engine is closed")

    def close(self, *, finish: bool) -> None:
        self.closed.set()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    """A base with 40 adapters, whose files are nowhere."""
    voice: Any = Voice(make_tokenizer(), None)

    def add(self: Catalog, name: str, answerer: Any) -> Served:
        self._served = {**self._served, name: Served(name, name, voice, "lora", "")}
        return self._served[name]

    monkeypatch.setattr(Catalog, "_add", add)
    monkeypatch.setattr("lorafit.serving.catalog.open_on_base", lambda *_: None)
    first = SimpleNamespace(quantization="none", voice=voice)
    base = SimpleNamespace(reference=("base",))
    adapters = {f"a{number}": SimpleNamespace(card=None) for number in range(40)}
    opened: Any = SimpleNamespace(name="base", base=base, voice=voice, first=first, adapters=adapters)
    engine: Any = Engine()
    settings = Settings("127.0.0.1", 0, None, True, 16, 5.0, 0.1)
    return Service(engine, Catalog(engine, opened, None, Silent()), settings, None, Silent())


ORDER = Order(lambda longest: Sampling(longest))


def test_pieces_that_are_all_there_do_not_hold_others_up(service: Service) -> None:
    """Of a client that read nothing for a while, or is cut off with thousands of them before it."""

    async def follow() -> int:
        writings, turns = service.write(service.catalog.choose("a0"), [[1]], ORDER), 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        engine: Any = service._engine
        for number in range(100):
            engine.tickets[0].add(Written(number, "a"))
        engine.tickets[0].end("length")
        beside = asyncio.create_task(other())
        assert len([piece async for piece in service.follow(writings)]) == 101
        beside.cancel()
        return turns

    assert asyncio.run(follow()) > 100


def test_another_adapter_of_the_same_name_does_not_answer(service: Service) -> None:
    """A prompt is rendered for the one that was there; its template is not that of the next."""

    async def swap() -> None:
        served, engine = service.catalog.choose("a0"), service._engine
        engine.closed.set()  # type: ignore[attr-defined]
        with pytest.raises(UsageError):
            service.catalog.unload("a0")
        with pytest.raises(ApiError) as gone:
            service.write(served, [[1]], ORDER)
        service.catalog.load("a0", Path())
        with pytest.raises(ApiError) as other:
            service.write(served, [[1]], ORDER)
        assert gone.value.status == other.value.status == 404
        assert all(ticket.is_cancelled for ticket in engine.tickets)  # type: ignore[attr-defined]

    asyncio.run(swap())


def test_a_request_that_can_never_be_answered_costs_nothing(service: Service) -> None:
    """Not 429, for there is no use in patience; nor a minute for the tokens of what no prompt could hold."""
    for texts, answers, param in ((["a"], 9, "n"), (["a", "x" * 3_201], 2, "messages")):
        with pytest.raises(ApiError) as told:
            service.bound(*texts, answers=answers)
        assert (told.value.status, told.value.headers, told.value.param) == (400, {}, param)
    service.bound("x" * 3_200, answers=8)


def test_prompts_that_wait_to_be_read_are_bounded(service: Service) -> None:
    async def ask() -> None:
        served, go_on = service.catalog.choose("a0"), threading.Event()
        service._renders.submit(go_on.wait, 20)
        waiting = [asyncio.create_task(service.read(served, "the shop")) for _ in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="8 prompts wait") as told:
            await service.read(served, "the shop")
        assert (told.value.status, told.value.headers) == (429, {"Retry-After": "1"})
        go_on.set()
        assert len(await asyncio.gather(*waiting)) == 8
        assert await service.read(served, "the shop")

    asyncio.run(ask())


def test_adapters_that_wait_to_go_hold_up_neither_others_nor_the_end(service: Service) -> None:
    """More of them than asyncio has threads."""

    async def go() -> list[BaseException | None]:
        unloads = [
            asyncio.create_task(
                routes._change(service, lambda name=f"a{number}": service.catalog.unload(name), "lora_name")
            )
            for number in range(40)
        ]
        await asyncio.sleep(0.2)
        await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(service._renders, load), 5)
        await asyncio.wait_for(service.drain(), 5)
        return await asyncio.gather(*unloads, return_exceptions=True)

    def load() -> None:
        service.catalog.load("more", Path())

    ends = asyncio.run(go())
    assert {end.status for end in ends if isinstance(end, ApiError)} == {503} and len(ends) == 40


def health(service: Service, engine: Any, end: Any = None) -> tuple[str, int]:
    """What a look at the health tells, and how many tokens it had written; `end` is done to their tickets."""

    async def ask() -> str:
        looking = asyncio.create_task(service.check_health())
        while not engine.tickets and not looking.done():
            await asyncio.sleep(0.001)
        for ticket in engine.tickets if end is not None else ():
            end(ticket)
        try:
            await asyncio.wait_for(looking, 5)
        except ApiError as error:
            assert error.status == 503
            return error.message
        return "well"

    return asyncio.run(ask()), len(engine.tickets)


def write(ticket: Ticket) -> None:
    ticket.add(Written(1, "a"))
    ticket.end("length")


def fail(ticket: Ticket) -> None:
    ticket.end("error", NumericsError("the model's logits are not finite"))


def test_an_idle_server_shows_its_health_by_a_token_that_is_no_answer(service: Service) -> None:
    engine: Any = service._engine
    assert health(service, engine, write) == ("well", 1)
    assert [ticket.request.counts for ticket in engine.tickets] == [False]
    engine.tickets.clear()
    told, asked = health(service, engine, fail)
    assert "not finite" in told and asked == 1


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        (Figures(1, 0, 0, still_seconds=29), "well"),
        (Figures(1, 3, 0, still_seconds=31), "no token was written within 30 seconds"),
        (Figures(1, 3, reading=1, still_seconds=31), "well"),  # a long prompt, in one forward
        (Figures(1, 3, reading=1, still_seconds=91), "no token was written within 90 seconds"),
    ],
)
def test_a_busy_server_shows_its_health_by_its_forwards(service: Service, figures: Figures, expected: str) -> None:
    engine: Any = service._engine
    service.settings = replace(service.settings, timeout_seconds=90)
    engine.told = figures
    assert health(service, engine) == (expected, 0)


def test_a_failed_engine_is_ill_and_says_why(service: Service) -> None:
    engine: Any = service._engine
    engine.failed.set_exception(LorafitError("the model failed: lost"))

    async def ask() -> None:
        with pytest.raises(ApiError, match="the model failed: lost") as told:
            service.write(service.catalog.choose("a0"), [[1]], ORDER)
        assert told.value.status == 500

    asyncio.run(ask())
    assert health(service, engine) == ("the model failed: lost", 0)
