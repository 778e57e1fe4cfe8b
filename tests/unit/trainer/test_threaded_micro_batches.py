"""Micro-batches abreast give the gradients of one by one, whoever is done first, and leave no thread behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorafit.contracts import Batch
from lorafit.kinds.tasks import tasks
from lorafit.model.fuse import fuse_layers
from lorafit.plan import ResolvedPlan
from lorafit.trainer.state import TrainState
from lorafit.trainer.step import accumulate_gradients
from lorafit.trainer.threaded_micro_batches import Abreast, threads_abreast
from tests.support.tiny_run import PAD, Job, Rows

CAUSAL_LM = tasks.make("causal-lm")

CPU = torch.device("cpu")


def batches_of(rows: Rows, count: int) -> list[Batch]:
    return [CAUSAL_LM.collate([[rows[row]]], PAD) for row in range(count)]


def gradients_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in trainer.named}


def accumulate(trainer: Any, batches: list[Batch], count: int) -> tuple[Any, dict[str, torch.Tensor]]:
    trainer.objective.train()
    trainer.optimizer.zero_grad(set_to_none=True)
    abreast = Abreast(count, trainer.parameters) if count > 1 else None
    with abreast or threading.Lock():
        figures, sums = accumulate_gradients(
            trainer.objective, batches, trainer.accelerator, None, lambda: None, abreast=abreast
        )
    assert len(sums) == len(batches)
    return figures, gradients_of(trainer)


def micro_batch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lorafit-micro-batch")]


@pytest.mark.parametrize("count", [2, 3])
def test_the_gradients_are_those_of_one_by_one(job: Callable[..., Job], count: int) -> None:
    trainer = job("run").trainer()
    batches = batches_of(trainer.examples, 7)
    figures, expected = accumulate(trainer, batches, 1)
    found_figures, found = accumulate(trainer, batches, count)
    assert found_figures.loss == pytest.approx(figures.loss, rel=1e-6)
    assert (found_figures.tokens, found_figures.trained_tokens) == (figures.tokens, figures.trained_tokens)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
    assert not micro_batch_threads()


def test_the_order_of_the_sum_is_that_of_the_micro_batches(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever thread is late: not a bit differs."""
    trainer = job("run").trainer()
    batches = batches_of(trainer.examples, 6)
    _, expected = accumulate(trainer, batches, 2)
    differentiate = Abreast._differentiate

    def late(self: Abreast, objective: Any, batch: Batch, *arguments: Any) -> Any:
        time.sleep(0.05 if batch is batches[0] or batch is batches[3] else 0.0)
        return differentiate(self, objective, batch, *arguments)

    monkeypatch.setattr(Abreast, "_differentiate", late)
    _, found = accumulate(trainer, batches, 3)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_two_run_at_the_same_time(job: Callable[..., Job]) -> None:
    trainer = job("run").trainer()
    meeting = threading.Barrier(2, timeout=20)

    def meet(batch: Batch) -> Any:
        meeting.wait()  # passes only where two are in here together
        return trainer.objective(batch)

    with Abreast(2, trainer.parameters) as abreast:
        losses = abreast.accumulate(meet, batches_of(trainer.examples, 4), 1.0, lambda: None)
    assert len(losses) == 4


def test_each_thread_computes_on_one_core_and_the_caller_keeps_its_own(job: Callable[..., Job]) -> None:
    trainer = job("run").trainer()
    seen = []

    def count_threads(batch: Batch) -> Any:
        seen.append(torch.get_num_threads())
        return trainer.objective(batch)

    torch.set_num_threads(2)
    with Abreast(2, trainer.parameters) as abreast:
        abreast.accumulate(count_threads, batches_of(trainer.examples, 3), 1.0, lambda: None)
    assert seen == [1, 1, 1]
    assert torch.get_num_threads() == 2


def test_an_error_in_a_thread_comes_out_and_ends_the_step(job: Callable[..., Job]) -> None:
    trainer = job("run").trainer()
    batches = batches_of(trainer.examples, 12)
    seen = []

    def fail(batch: Batch) -> Any:
        seen.append(batch)
        if batch is batches[1]:
            raise RuntimeError("alloc_cpu: can't allocate memory")
        time.sleep(0.02)
        return trainer.objective(batch)

    with Abreast(2, trainer.parameters) as abreast:
        with pytest.raises(RuntimeError, match="alloc_cpu"):
            abreast.accumulate(fail, batches, 1.0, lambda: None)
        assert len(seen) < len(batches)  # what had not begun was not begun
    assert not micro_batch_threads()


def test_a_stop_between_two_turns_ends_the_step(job: Callable[..., Job]) -> None:
    trainer = job("run").trainer()
    with Abreast(2, trainer.parameters) as abreast, pytest.raises(KeyboardInterrupt):
        abreast.accumulate(trainer.objective, batches_of(trainer.examples, 12), 1.0, interrupt)
    assert not micro_batch_threads()


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_run_abreast_is_the_run_one_by_one(job: Callable[..., Job]) -> None:
    results = []
    for at_once in (1, 2):
        run = job(f"run-{at_once}", at_once=at_once)
        run.trainer().fit(TrainState())
        results.append([line for line in run.lines() if "loss" in line])
    assert len(results[0]) == len(results[1]) > 2
    for alone, together in zip(*results, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)


def test_a_resumed_run_abreast_repeats_every_bit(job: Callable[..., Job]) -> None:
    whole = job("whole", at_once=2)
    whole.trainer().fit(TrainState())
    expected = [line for line in whole.lines() if "loss" in line]
    kept = sorted(int(folder.name.removeprefix("step-")) for folder in (whole.root / "checkpoints").glob("step-*"))
    adapter = whole.files(kept[-1])
    trainer, state = whole.resume(kept[0])
    assert state.step == kept[0] < kept[-1] == expected[-1]["step"]
    trainer.fit(state)
    assert whole.files(kept[-1]) == adapter
    again = [line for line in whole.lines() if "loss" in line]
    assert [(x["step"], x["loss"], x["grad_norm"]) for x in again] == [
        (x["step"], x["loss"], x["grad_norm"]) for x in expected
    ]


def test_one_at_a_time_where_threads_would_disturb_each_other(job: Callable[..., Job]) -> None:
    torch.set_num_threads(2)
    plain = job("plain").trainer().objective
    assert threads_abreast(plain, CPU, 1, checkpointing=True) == 2
    assert threads_abreast(plain, CPU, 2, checkpointing=False) == 1  # ranks share the cores already
    assert threads_abreast(plain, torch.device("cuda"), 1, checkpointing=False) == 1
    plain.exact = True  # its head is hooked for the time of a forward
    assert threads_abreast(plain, CPU, 1, checkpointing=False) == 1
    plain.exact = False
    plain.base.config.attention_dropout = 0.1
    assert threads_abreast(plain, CPU, 1, checkpointing=False) == 1
    plain.base.config.attention_dropout = 0.0
    plain.base.config.rope_parameters = {"rope_type": "dynamic"}
    assert threads_abreast(plain, CPU, 1, checkpointing=False) == 1


def test_adapters_dropout_is_drawn_apart_and_whose_turn_it_is_does_not_matter(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    trainer = job("run", dropout=0.3).trainer()
    assert threads_abreast(trainer.objective, CPU, 1, checkpointing=False) == 1  # PEFT's own forward draws by itself
    fuse_layers(trainer.objective.model)
    assert threads_abreast(trainer.objective, CPU, 1, checkpointing=False) == 2
    assert threads_abreast(trainer.objective, CPU, 1, checkpointing=True) == 1  # a second forward drops other values
    batches = batches_of(trainer.examples, 6)
    found = []
    for delays in ((0.0, 0.0), (0.05, 0.0)):
        differentiate = Abreast._differentiate

        def late(self: Abreast, objective: Any, batch: Batch, *arguments: Any) -> Any:
            time.sleep(delays[0] if batch is batches[0] else delays[1])  # noqa: B023
            return differentiate(self, objective, batch, *arguments)  # noqa: B023

        torch.manual_seed(4)
        with monkeypatch.context() as patch:
            patch.setattr(Abreast, "_differentiate", late)
            found.append(accumulate(trainer, batches, 2)[1])
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())
    torch.manual_seed(5)
    other = accumulate(trainer, batches, 2)[1]
    assert any(not torch.equal(other[name], gradient) for name, gradient in found[0].items())


def test_a_plan_of_before_reads_as_one_by_one() -> None:
    values = {
        "micro_batch_tokens": 64,
        "evaluation_micro_batch_tokens": 64,
        "attention": "sdpa",
        "dtype": "fp32",
        "gradient_checkpointing": False,
        "compute_dtype": "fp32",
        "device_kind": "cpu",
        "ranks": 1,
        "source": "rehearsal",
    }
    old = ResolvedPlan.from_json(values)
    assert (old.micro_batches_at_once, old.tokens_at_once) == (1, 64)
    new = ResolvedPlan.from_json({**values, "micro_batches_at_once": 3})
    assert ResolvedPlan.from_json(new.to_json()).tokens_at_once == 192
