"""States of prompts: of the base alone, the same beside others, and read while answers go on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lorafit.answering import states
from lorafit.answering.batched import BatchedEngine, Limits
from lorafit.answering.engine import Engine
from lorafit.answering.sampling import Sampling
from lorafit.answering.states import StateReader, mean_states
from lorafit.answering.ticket import LiveRequest
from lorafit.errors import LorafitError, ModelError, QueueFull, UsageError
from tests.support.adapted import randomise
from tests.unit.answering.test_engine import PROMPTS, adapter_folder
from tests.unit.evaluation.conftest import build_llama


@pytest.fixture
def live(tmp_path: Path, tokenizer: Any) -> Iterator[BatchedEngine]:
    live = BatchedEngine(Engine(build_llama(), tokenizer, quantization="none"), Limits(waiting=8))
    live.load_adapter("law", adapter_folder(tmp_path / "law", 1))
    yield live
    live.close(finish=False)


def test_a_state_is_the_mean_of_the_lowest_third_of_the_base(live: BatchedEngine, tokenizer: Any) -> None:
    reader, base = StateReader(live), build_llama()
    ids = reader.ids(PROMPTS[1])
    assert ids == [tokenizer.eos_token_id, *tokenizer(PROMPTS[1])["input_ids"]]
    with torch.no_grad():
        hidden = base(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    expected = torch.nn.functional.normalize(hidden[max(1, (len(hidden) - 1) // 3)][0], dim=-1)[1:].mean(0)
    torch.testing.assert_close(live.between_steps(lambda engine: mean_states(engine, [ids]))[0], expected)


def test_an_adapter_that_is_no_product_beside_its_linear_is_off(live: BatchedEngine, tmp_path: Path) -> None:
    """Those that PEFT computes, one at a time."""

    def state() -> torch.Tensor:
        return live.between_steps(lambda engine: mean_states(engine, [[1, 5, 6, 7]]))

    before = state()
    torch.manual_seed(0)
    tuned = get_peft_model(build_llama(), LoraConfig(r=4, target_modules="all-linear", use_dora=True))
    randomise(tuned, 1)
    tuned.save_pretrained(tmp_path / "dora")
    live.load_adapter("dora", tmp_path / "dora")
    request = LiveRequest([1, 5, 6], "dora", Sampling(max_new_tokens=4))
    list(live.submit(request))
    torch.testing.assert_close(state(), before)
    assert live.engine.adapters == ("dora",)


def test_layers_that_answer_in_another_form_are_refused(live: BatchedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "layer_list", lambda _: torch.nn.ModuleList())
    with pytest.raises(ModelError, match="no layers that give a state for each token"):
        live.between_steps(lambda engine: mean_states(engine, [[1, 2]]))


def test_of_a_long_text_the_beginning_is_looked_at(live: BatchedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "LONGEST_PROMPT", 30)
    reader, seen = StateReader(live), list[int]()
    tokenizer = reader._tokenizer
    monkeypatch.setattr(reader, "_tokenizer", Counting(tokenizer, seen))
    assert reader.ids("z" * 10_000) == reader.ids("z" * 30)
    assert seen == [30, 30]
    reader.longest = 4
    assert len(reader.ids("a b c d e f g h")) == 1 + 4


class Counting:
    """A tokenizer that notes the length of what it is given."""

    def __init__(self, tokenizer: Any, seen: list[int]) -> None:
        self._tokenizer, self._seen = tokenizer, seen
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id

    def __call__(self, text: str, **options: Any) -> Any:
        self._seen.append(len(text))
        return self._tokenizer(text, **options)


def test_states_are_the_same_beside_others(live: BatchedEngine) -> None:
    reader = StateReader(live)
    alone = [
        live.between_steps(lambda engine, ids=ids: mean_states(engine, [ids]))[0] for ids in map(reader.ids, PROMPTS)
    ]
    together = reader.read_all(PROMPTS, lambda _: None)
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-6, rtol=1e-5)
    assert (together - together[0]).abs().amax(1)[1:].min() > 1e-3


def test_those_that_wait_share_a_forward(live: BatchedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def count(engine: Engine, rows: Any) -> torch.Tensor:
        seen.append(len(rows))
        return mean_states(engine, rows)

    monkeypatch.setattr(states, "mean_states", count)
    reader, free, begun = StateReader(live), threading.Event(), threading.Event()
    held = live.order(lambda _: (begun.set(), free.wait(20)))
    assert begun.wait(20)
    futures = [reader.submit(reader.ids(text)) for text in PROMPTS]
    futures[0].cancel()  # its client went
    with pytest.raises(QueueFull):
        for _ in range(9):
            reader.submit([1, 2])
    free.set()
    assert held.result()
    assert all(future.result(20).shape == (64,) for future in futures[1:])
    assert seen[0] == 7


def test_long_prompts_are_read_in_several_turns(live: BatchedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that running answers get their tokens in between."""
    monkeypatch.setattr(states, "READ_AT_ONCE_TOKENS", 16)
    turns: list[int] = []
    turn = live._turn
    monkeypatch.setattr(live, "_turn", lambda: (turns.append(1), turn())[1])
    reader = StateReader(live)
    futures = [reader.submit([1] * 12) for _ in range(4)]
    assert torch.stack([future.result(20) for future in futures]).isfinite().all()
    assert len(turns) >= 3


def test_running_answers_do_not_notice(live: BatchedEngine) -> None:
    def answer() -> str:
        request = LiveRequest(live.engine.tokenizer(PROMPTS[1])["input_ids"], "law", Sampling(max_new_tokens=40))
        return "".join(piece.text for piece in live.submit(request))

    alone, reader, found = answer(), StateReader(live), list[str]()
    asking = threading.Thread(target=lambda: found.append(answer()))
    asking.start()
    while asking.is_alive():
        reader.submit(reader.ids("z" * 60)).result(20)
    asking.join()
    assert found == [alone]


def test_a_closed_engine_says_so(live: BatchedEngine) -> None:
    reader = StateReader(live)
    live.close(finish=True)
    with pytest.raises(UsageError, match="closed"):
        reader.submit([1, 2])


def test_an_engine_that_fails_leaves_no_state_awaited(live: BatchedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, held, go_on = StateReader(live), threading.Event(), threading.Event()

    def hold(engine: Engine) -> None:
        held.set()
        go_on.wait()
        live._model_changed = True  # as a load does: the model is prepared anew

    def fail(self: BatchedEngine) -> Any:
        raise MemoryError

    live.order(hold)
    held.wait()
    waits = reader.submit([5, 6])
    monkeypatch.setattr(BatchedEngine, "_prepared", fail)
    go_on.set()
    with pytest.raises(LorafitError, match="out of memory"):
        waits.result(20)
    with pytest.raises(LorafitError, match="out of memory"):
        reader.submit([5, 6])
