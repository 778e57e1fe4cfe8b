"""Requests that are answered at once get the answers of lone runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorafit.answering.batched import BatchedEngine, Limits
from lorafit.answering.engine import Engine
from lorafit.answering.generate import Request
from lorafit.answering.sampling import Sampling
from lorafit.answering.ticket import LiveRequest, Ticket
from lorafit.errors import QueueFull, UsageError
from tests.unit.answering.test_engine import PROMPTS, adapter_folder
from tests.unit.evaluation.conftest import build_llama

SHORT = Sampling(max_new_tokens=12)
NAMES = (None, "law", "code")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {name: adapter_folder(tmp_path / name, seed) for name, seed in (("law", 1), ("code", 2))}


@pytest.fixture
def live(folders: dict[str, Path], tokenizer: Any) -> Iterator[BatchedEngine]:
    live = BatchedEngine(Engine(build_llama(), tokenizer, quantization="none"))
    for name, folder in folders.items():
        live.load_adapter(name, folder)
    yield live
    live.close(finish=False)


def text_of(ticket: Ticket) -> str:
    return "".join(piece.text for piece in ticket)


def ask(live: BatchedEngine, text: str, adapter: str | None = None, sampling: Sampling = SHORT, **more: Any) -> Ticket:
    return live.submit(LiveRequest(live.engine.tokenizer(text)["input_ids"], adapter, sampling, **more))


@pytest.mark.parametrize("sampling", [SHORT, Sampling(max_new_tokens=12, temperature=0.9, top_p=0.9, seed=3)])
def test_answers_are_those_of_lone_runs(live: BatchedEngine, folders: Any, tokenizer: Any, sampling: Sampling) -> None:
    asked = [(text, name) for text in PROMPTS for name in NAMES]
    tickets = [ask(live, text, name, sampling) for text, name in asked]
    found = [text_of(ticket) for ticket in tickets]
    engine = Engine(build_llama(), tokenizer)
    for name, folder in folders.items():
        engine.add_adapter(name, folder)
    lone = [engine.answer([Request(tokenizer(text)["input_ids"], name, sampling)])[0] for text, name in asked]
    assert found == [answer.text for answer in lone]
    assert len(set(found)) > len(PROMPTS)
    assert [ticket.finish_reason for ticket in tickets] == [answer.ended for answer in lone]


def test_a_full_line_is_told_with_its_numbers(tokenizer: Any) -> None:
    live = BatchedEngine(Engine(build_llama(), tokenizer), Limits(rows=1, waiting=2))
    held, go_on = threading.Event(), threading.Event()

    def hold(engine: Engine) -> None:
        held.set()
        go_on.wait()

    holder = threading.Thread(target=live.between_steps, args=[hold])
    holder.start()
    held.wait()
    tickets = [ask(live, "a"), ask(live, "b")]
    with pytest.raises(QueueFull, match="0 requests are being answered and 2 wait"):
        ask(live, "c")
    go_on.set()
    holder.join()
    assert all(len(text_of(ticket)) > 3 for ticket in tickets)
    live.close(finish=True)
    with pytest.raises(UsageError, match="is closed"):
        ask(live, "d")


def test_a_cancelled_answer_ends_at_its_next_token(live: BatchedEngine) -> None:
    ticket = ask(live, "why?", "law", Sampling(max_new_tokens=200, min_new_tokens=200))
    assert ticket.read() is not None
    ticket.cancel()
    assert len(list(ticket)) < 150 and ticket.finish_reason == "cancelled"
    assert live.figures().running == 0


def test_an_unknown_adapter_is_told_the_loaded_ones(live: BatchedEngine) -> None:
    with pytest.raises(UsageError, match="'laws'; loaded: law, code"):
        ask(live, "a", "laws")
    live.unload_adapter("law")
    with pytest.raises(UsageError, match="'law'; loaded: code"):
        ask(live, "a", "law")
