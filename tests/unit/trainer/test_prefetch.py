"""Steps built ahead are the steps that would have been built in turn; errors come when their step comes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from lorafit.contracts import Example
from lorafit.data.packing import Cutter
from lorafit.errors import DataError
from lorafit.trainer.prefetch import StepFeed
from lorafit.trainer.state import TrainState
from tests.support.tiny_run import Job, Rows, TinyPlan


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lorafit-feed")]


class Builder:
    """Writes down who built what; step 3 of an unlucky one fails."""

    def __init__(self, failing: int | None = None) -> None:
        self.built: list[tuple[int, int, bool]] = []
        self.failing = failing
        self.may_build = threading.Event()
        self.may_build.set()

    def __call__(self, step: int, budget: int) -> tuple[int, int]:
        ahead = threading.current_thread() is not threading.main_thread()
        if ahead:
            self.may_build.wait(10)
        self.built.append((step, budget, ahead))
        if step == self.failing:
            raise DataError("cannot be read", file="rows.jsonl", line=7)
        return step, budget


def test_the_next_step_is_built_meanwhile_and_none_beyond_the_last() -> None:
    builder = Builder()
    with StepFeed(builder, last_step=3) as feed:
        assert [feed.take(step, 64) for step in (1, 2, 3)] == [(1, 64), (2, 64), (3, 64)]
    assert sorted(builder.built) == [(1, 64, False), (2, 64, True), (3, 64, True)]
    assert threads() == []


def test_a_halved_budget_is_respected() -> None:
    """The step is taken again with half of it; what was built ahead for the whole is thrown away."""
    builder = Builder()
    with StepFeed(builder, last_step=9) as feed:
        assert feed.take(1, 64) == (1, 64)
        assert feed.take(1, 32) == (1, 32)
        assert feed.take(2, 32) == (2, 32)
        assert feed.take(3, 16) == (3, 16)
    assert {(1, 64, False), (1, 32, False), (2, 32, True), (3, 16, False)} <= set(builder.built)


def test_an_error_comes_when_its_step_comes() -> None:
    with StepFeed(Builder(failing=2), last_step=3) as feed:
        assert feed.take(1, 64) == (1, 64)
        with pytest.raises(DataError, match="cannot be read") as caught:
            feed.take(2, 64)
        assert (caught.value.file, caught.value.line) == ("rows.jsonl", 7)
        assert feed.take(3, 64) == (3, 64)
    assert threads() == []


def test_an_error_that_nobody_asked_for_is_none() -> None:
    with StepFeed(Builder(failing=2), last_step=3) as feed:
        feed.take(1, 64)
    assert threads() == []


def test_a_stop_waits_for_what_is_being_built() -> None:
    builder = Builder()
    builder.may_build.clear()
    with pytest.raises(KeyboardInterrupt), StepFeed(builder, last_step=3) as feed:
        feed.take(1, 64)
        threading.Timer(0.1, builder.may_build.set).start()
        raise KeyboardInterrupt
    assert (2, 64, True) in builder.built
    assert threads() == []


class TornRows(Rows):
    """Row 30 cannot be read."""

    def __getitem__(self, index: int) -> Example:
        if index == 30:
            raise DataError("cannot be read", file="rows.jsonl", line=31)
        return super().__getitem__(index)


def test_training_ends_at_the_step_of_the_row_that_cannot_be_read(tmp_path: Path) -> None:
    job = Job(tmp_path, rows=TornRows(44), batch_size=4, plan=TinyPlan(total_steps=11, save_every_steps=100))
    trainer = job.trainer()
    bad_step = next(step for step in range(1, 12) if 30 in trainer.step_rows.rows(step)[1])
    assert bad_step > 2
    with pytest.raises(DataError) as caught:
        trainer.fit(TrainState())
    assert (caught.value.file, caught.value.line) == ("rows.jsonl", 31)
    assert [line["step"] for line in job.lines()] == list(range(1, bad_step))
    assert threads() == []


def test_all_steps_but_the_first_are_built_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path, plan=TinyPlan(total_steps=4))
    builders: list[str] = []
    real = Cutter.cut
    watched = lambda *given: builders.append(threading.current_thread().name) or real(*given)  # noqa: E731
    monkeypatch.setattr(Cutter, "cut", watched)
    job.trainer().fit(TrainState())
    assert builders[0] == "MainThread" and all(name.startswith("lorafit-feed") for name in builders[1:])
    assert len(builders) == 4 and threads() == []


def test_batches_for_a_card_are_pinned_where_they_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the feed's thread, every tensor of them; a CPU's are left where they are."""
    pinned: list[str] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(threading.current_thread().name)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    trainer = Job(tmp_path / "one", plan=TinyPlan(2, 2)).trainer()
    plain = trainer.build_micro_batches(1, 80)
    assert not pinned
    trainer.executor.device = torch.device("cuda")
    with trainer.feed as feed:
        first, _ = feed.take(1, 80), feed.take(2, 80)
    tensors = [(a[name], b[name]) for a, b in zip(plain, first, strict=True) for name in a.tensors]
    assert all(torch.equal(a, b) and a is not b for a, b in tensors)
    assert len(pinned) > len(tensors) > 2 and any(name.startswith("lorafit-feed") for name in pinned)
