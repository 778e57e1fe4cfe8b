"""Requests that are answered at once get the answers of lone runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit.answering.answer_text import AnswerText
from lorafit.answering.batched import BatchedEngine, Limits
from lorafit.answering.engine import Engine
from lorafit.answering.generate import Request
from lorafit.answering.sampling import Sampling
from lorafit.answering.ticket import LiveRequest, Ticket
from lorafit.errors import LorafitError, QueueFull, UsageError
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


def hold(live: BatchedEngine) -> tuple[threading.Event, threading.Thread]:
    """Keeps an engine's thread busy until the event is set; the thread that waits for it is to be joined."""
    held, go_on = threading.Event(), threading.Event()

    def wait(engine: Engine) -> None:
        held.set()
        go_on.wait()

    holder = threading.Thread(target=live.between_steps, args=[wait])
    holder.start()
    held.wait()
    return go_on, holder


def test_a_full_line_is_told_with_its_numbers(tokenizer: Any) -> None:
    live = BatchedEngine(Engine(build_llama(), tokenizer), Limits(rows=1, waiting=2))
    go_on, holder = hold(live)
    tickets = [ask(live, "a"), ask(live, "b"), ask(live, "c")]  # the first has a place, which it takes at the next turn
    with pytest.raises(QueueFull, match="0 requests are being answered and 3 wait"):
        ask(live, "d")
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
    assert live.room(1, "law") == live.room(1)  # a server may ask in the moment in which it goes


@pytest.mark.parametrize("stops", [("blue",), ("e b", "blue"), ("xyz",), ("sky is blue and",)])
def test_no_piece_holds_what_a_stop_string_may_begin_with(tokenizer: Any, stops: tuple[str, ...]) -> None:
    whole = "été ☃: the sky is blue, e been"
    text, pieces = AnswerText(tokenizer, stops), list[str]()
    for token in tokenizer(whole)["input_ids"]:
        pieces.append(text.add(token))
        if text.is_stopped:
            break
    pieces.append("" if text.is_stopped else text.finish())
    ends = [place for stop in stops if (place := whole.find(stop)) >= 0]
    assert "".join(pieces) == (whole[: min(ends)] if ends else whole)
    assert text.is_stopped == bool(ends) and not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_is_told_at_the_end(tokenizer: Any) -> None:
    text = AnswerText(tokenizer)
    ids = tokenizer("a☃")["input_ids"][:-1]
    assert "".join(text.add(token) for token in ids) == "a"
    assert text.finish() == "\ufffd"


def test_a_stop_string_ends_an_answer(live: BatchedEngine) -> None:
    whole = text_of(ask(live, "why?", "law"))
    stop = whole[4:6]
    ticket = ask(live, "why?", "law", stop_strings=(stop,))
    assert text_of(ticket) == whole[: whole.find(stop)] and ticket.finish_reason == "stop"


def test_a_stop_token_ends_an_answer_and_is_none_of_its_text(live: BatchedEngine) -> None:
    pieces = list(ask(live, "why?", "law"))
    ids = [piece.token_id for piece in pieces]
    ticket = ask(live, "why?", "law", stop_ids=(ids[3],))
    again = list(ticket)
    end = ids.index(ids[3])
    assert [piece.token_id for piece in again] == ids[: end + 1] and ticket.finish_reason == "stop"
    assert again[-1].text in ("", "\ufffd")


def test_log_probabilities_are_the_model_s(live: BatchedEngine, tokenizer: Any) -> None:
    prompt = tokenizer("the sky")["input_ids"]
    sampling = Sampling(max_new_tokens=5, temperature=0.8, seed=1)
    pieces = list(live.submit(LiveRequest(prompt, None, sampling, top_logprobs=3)))
    ids = [piece.token_id for piece in pieces]
    with torch.no_grad():
        logits = build_llama().eval()(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    logprobs = torch.log_softmax(logits, dim=-1)
    for place, piece in enumerate(pieces):
        values, likeliest = logprobs[place].topk(3)
        assert piece.logprob == pytest.approx(float(logprobs[place, piece.token_id]), abs=1e-4)
        assert [token for token, _ in piece.top_logprobs] == likeliest.tolist()
        assert [value for _, value in piece.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
    assert all(piece.logprob is None for piece in ask(live, "the sky"))


def test_a_name_that_leaves_is_not_taken_anew(live: BatchedEngine, folders: dict[str, Path]) -> None:
    ticket = ask(live, "a", "law", Sampling(max_new_tokens=200))
    leaving = threading.Thread(target=live.unload_adapter, args=["law"])
    leaving.start()
    while "law" in live.adapters:
        pass
    with pytest.raises(UsageError, match="'law' is being unloaded"):
        live.load_adapter("law", folders["law"])
    ticket.cancel()
    leaving.join()
    live.load_adapter("law", folders["law"])


def test_an_adapter_leaves_when_its_requests_are_answered(live: BatchedEngine) -> None:
    ticket = ask(live, "why?", "law", Sampling(max_new_tokens=60, min_new_tokens=60))
    assert ticket.read() is not None
    leaving = threading.Thread(target=live.unload_adapter, args=["law"])
    leaving.start()
    assert len(list(ticket)) == 59 and ticket.finish_reason == "length"
    leaving.join()
    assert live.adapters == ("code",)


def test_closing_answers_who_is_there(tokenizer: Any) -> None:
    live = BatchedEngine(Engine(build_llama(), tokenizer), Limits(rows=2))
    tickets = [ask(live, text) for text in PROMPTS]
    live.close(finish=True)
    assert all(ticket.finish_reason in ("length", "stop") for ticket in tickets)
    assert sum(live.figures().finished.values()) == len(PROMPTS) and not live.figures().running


def test_what_does_not_fit_is_refused_with_its_numbers(live: BatchedEngine) -> None:
    with pytest.raises(UsageError, match="a prompt of 200 tokens leaves room for 56 more, and 57 are asked for"):
        ask(live, "x" * 200, "law", Sampling(57))
    assert live.room(200, "law") == 56
    with pytest.raises(UsageError, match="ask without beams"):
        ask(live, "x", "law", Sampling(8, num_beams=2))


def test_a_reader_may_wait_so_long_or_be_woken(tokenizer: Any) -> None:
    live, woken = BatchedEngine(Engine(build_llama(), tokenizer)), threading.Event()
    go_on = threading.Event()
    holder = threading.Thread(target=live.between_steps, args=[lambda _: go_on.wait()])
    holder.start()
    ticket = live.submit(LiveRequest(tokenizer("a")["input_ids"], sampling=Sampling(1)), woken.set)
    with pytest.raises(TimeoutError):
        ticket.read(0.01)
    assert not woken.is_set()
    go_on.set()
    assert woken.wait(20) and ticket.read(20) is not None
    holder.join()
    live.close(finish=True)


def test_limits_hold_while_many_wait(tokenizer: Any) -> None:
    """Three rows of at most 20 positions fit into 60; a fourth waits, whatever its own length."""
    model = build_llama()
    live, rows = BatchedEngine(Engine(model, tokenizer), Limits(rows=8, tokens=60)), list[int]()
    model.get_input_embeddings().register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    exactly = Sampling(max_new_tokens=16, min_new_tokens=16)
    tickets = [ask(live, "abcd", None, exactly) for _ in range(7)]
    assert [len(list(ticket)) for ticket in tickets] == [16] * 7 and max(rows) == 3
    live.close(finish=True)


def test_an_error_of_our_own_ends_requests_and_not_the_engine(live: BatchedEngine, monkeypatch: Any) -> None:
    admit, failed = live._admit, list[int]()

    def fail_once() -> None:
        if not failed and live._waiting:
            failed.append(1)
            raise KeyError("lost")
        admit()

    monkeypatch.setattr(live, "_admit", fail_once)
    with pytest.raises(LorafitError, match="the model failed: 'lost'"):
        list(ask(live, "why?"))
    assert len(list(ask(live, "why?"))) == 12 and live.figures().finished[None, "error"] == 1


def test_a_name_is_given_once(live: BatchedEngine, folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="two adapters are called 'law'"):
        live.load_adapter("law", folders["code"])


def test_a_worker_that_dies_leaves_nobody_waiting(tokenizer: Any, monkeypatch: Any) -> None:
    """Outside of a turn, where no request could be blamed: who waits and who comes later is told."""
    live = BatchedEngine(Engine(build_llama(), tokenizer))
    held, go_on = threading.Event(), threading.Event()

    def hold(engine: Engine) -> None:
        held.set()
        go_on.wait()
        live._model_changed = True  # as a load does: the model is prepared anew

    def fail(self: BatchedEngine) -> Any:
        raise MemoryError("no room")

    holder = threading.Thread(target=live.between_steps, args=[hold])
    holder.start()
    held.wait()
    ticket = ask(live, "a")
    late: list[str] = []

    def order() -> None:
        with pytest.raises(LorafitError) as told:
            live.between_steps(lambda engine: None)
        late.append(told.value.one_line)

    orderer = threading.Thread(target=order)
    orderer.start()
    while not live._orders:
        pass
    monkeypatch.setattr(BatchedEngine, "_prepared", fail)
    go_on.set()
    for thread in (holder, orderer):
        thread.join(20)
    with pytest.raises(LorafitError, match="out of memory"):
        ticket.read(20)
    with pytest.raises(LorafitError, match="out of memory"):
        ask(live, "b")
    assert late and "out of memory" in late[0]
    assert (live.figures().running, live.figures().waiting, live.failed.done()) == (0, 0, True)
    live.close(finish=True)


def test_figures_tell_how_long_nothing_moved_and_who_reads(tokenizer: Any) -> None:
    live = BatchedEngine(Engine(build_llama(), tokenizer))
    time.sleep(0.05)
    assert live.figures().still_seconds == 0  # nobody waits
    go_on, holder = hold(live)
    time.sleep(0.05)
    ticket = live.submit(LiveRequest([5], None, SHORT, counts=False))
    assert live.figures().still_seconds < 0.05  # since it came, at most
    time.sleep(0.05)
    assert live.figures().still_seconds > 0.04
    go_on.set()
    holder.join()
    text_of(ticket)
    live.close(finish=True)
    figures = live.figures()
    assert (figures.still_seconds, figures.reading) == (0, 0)
    assert not (sum(figures.prompt_tokens.values()) or sum(figures.written_tokens.values()))
    assert not sum(figures.finished.values())
