"""Micro-batches in threads give the gradients of one by one, whoever is done first, and leave no thread behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorafit.contracts import Batch
from lorafit.model.fuse import fuse_layers
from lorafit.objective import Objective
from lorafit.ops.rng import capture_rng
from lorafit.plan import ResolvedPlan
from lorafit.trainer.executor import Executor
from lorafit.trainer.state import TrainState
from lorafit.trainer.step import accumulate_gradients
from lorafit.trainer.threaded_micro_batches import InThreads, may_run_in_threads, run_at_once
from tests.support.tiny_run import CAUSAL_LM, PAD, Job, Rows, tiny_model

CPU = torch.device("cpu")


def batches_of(rows: Rows, count: int) -> list[Batch]:
    return [CAUSAL_LM.collate([[rows[row]]], PAD) for row in range(count)]


def gradients_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in trainer.update.named}


def accumulate(trainer: Any, batches: list[Batch], count: int) -> tuple[Any, dict[str, torch.Tensor]]:
    trainer.executor.objective.train()
    trainer.update.optimizer.zero_grad(set_to_none=True)
    with run_at_once(trainer.executor, count) as executor:
        figures, sums = accumulate_gradients(executor, batches)
    assert len(sums) == len(batches)
    return figures, gradients_of(trainer)


def micro_batch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lorafit-micro-batch")]


@pytest.mark.parametrize("count", [2, 3])
def test_the_gradients_are_those_of_one_by_one(job: Callable[..., Job], count: int) -> None:
    trainer = job("run").trainer()
    batches = batches_of(trainer.cutter.examples, 7)
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
    batches = batches_of(trainer.cutter.examples, 6)
    _, expected = accumulate(trainer, batches, 2)
    differentiate = InThreads._differentiate

    def late(self: InThreads, batch: Batch, *arguments: Any) -> Any:
        time.sleep(0.05 if batch is batches[0] or batch is batches[3] else 0.0)
        return differentiate(self, batch, *arguments)

    monkeypatch.setattr(InThreads, "_differentiate", late)
    _, found = accumulate(trainer, batches, 3)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_two_run_at_the_same_time(job: Callable[..., Job]) -> None:
    trainer = job("run").trainer()
    forward = trainer.executor.objective.forward
    meeting = threading.Barrier(2, timeout=20)

    def meet(batch: Batch) -> Any:
        meeting.wait()  # passes only where two are in here together
        return forward(batch)

    trainer.executor.objective.forward = meet

    with InThreads(trainer.executor.objective, 2) as threads:
        losses = threads.accumulate(batches_of(trainer.cutter.examples, 4), 1.0)
    assert len(losses) == 4


def test_each_thread_computes_on_one_core_and_the_caller_keeps_its_own(job: Callable[..., Job]) -> None:
    trainer = job("run").trainer()
    forward, seen = trainer.executor.objective.forward, []

    def count_threads(batch: Batch) -> Any:
        seen.append(torch.get_num_threads())
        return forward(batch)

    trainer.executor.objective.forward = count_threads

    torch.set_num_threads(2)
    with InThreads(trainer.executor.objective, 2) as threads:
        threads.accumulate(batches_of(trainer.cutter.examples, 3), 1.0)
    assert seen == [1, 1, 1]
    assert torch.get_num_threads() == 2


def test_an_error_in_a_thread_comes_out_and_ends_the_step(job: Callable[..., Job]) -> None:
    trainer = job("run").trainer()
    batches = batches_of(trainer.cutter.examples, 12)
    forward, seen = trainer.executor.objective.forward, []

    def fail(batch: Batch) -> Any:
        seen.append(batch)
        if batch is batches[1]:
            raise RuntimeError("alloc_cpu: can't allocate memory")
        time.sleep(0.02)
        return forward(batch)

    trainer.executor.objective.forward = fail

    with InThreads(trainer.executor.objective, 2) as threads:
        with pytest.raises(RuntimeError, match="alloc_cpu"):
            threads.accumulate(batches, 1.0)
        assert len(seen) < len(batches)  # what had not begun was not begun
    assert not micro_batch_threads()


def test_a_stop_between_two_turns_ends_the_step(job: Callable[..., Job]) -> None:
    trainer = job("run").trainer()
    with InThreads(trainer.executor.objective, 2) as threads, pytest.raises(KeyboardInterrupt):
        threads.accumulate(batches_of(trainer.cutter.examples, 12), 1.0, interrupt)
    assert not micro_batch_threads()


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_run_in_threads_is_the_run_one_by_one(job: Callable[..., Job]) -> None:
    results = []
    for at_once in (1, 2):
        run = job(f"run-{at_once}", at_once=at_once)
        run.trainer().fit(TrainState())
        results.append([line for line in run.lines() if "loss" in line])
    assert len(results[0]) == len(results[1]) > 2
    for alone, together in zip(*results, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)


def test_a_resumed_run_in_threads_repeats_every_bit(job: Callable[..., Job]) -> None:
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


def may_run(objective: Objective, *, checkpointing: bool = False) -> bool:
    batch = batches_of(Rows(1), 1)[0]
    return may_run_in_threads(Executor(objective, CPU), batch, checkpointing=checkpointing)


def test_one_at_a_time_where_threads_would_disturb_each_other(job: Callable[..., Job]) -> None:
    executor = job("plain").trainer().executor
    plain, batch = executor.objective, batches_of(Rows(1), 1)[0]
    assert may_run(plain, checkpointing=True)
    executor.ranks = 2  # they share the cores already
    assert not may_run_in_threads(executor, batch, checkpointing=False)
    assert not may_run_in_threads(Executor(plain, torch.device("cuda")), batch, checkpointing=False)
    plain.exact = True  # its head is hooked for the time of a forward
    assert not may_run(plain)
    plain.exact = False
    plain.base.config.rope_parameters = {"rope_type": "dynamic"}
    assert not may_run(plain)


def test_a_dropout_that_draws_by_itself_is_found_by_what_it_draws(job: Callable[..., Job]) -> None:
    """Attention's is a number and a function: no layer says that anything is dropped."""
    objective, rng = job("plain").trainer().executor.objective, capture_rng()
    for drops in (0.0, 0.1):
        for layer in objective.base.model.layers:
            layer.self_attn.attention_dropout = drops
        assert may_run(objective) is (drops == 0)
    assert capture_rng() == rng and objective.training


def with_dora() -> Objective:
    model = tiny_model(dropout=0.3, dora=True)
    fuse_layers(model)
    return CAUSAL_LM.build_objective(model)


def computed_in_fp32() -> Objective:
    """NF4 under a bf16 model whose products are computed in fp32: PEFT's own forward, which fuses nothing."""
    model = tiny_model(dropout=0.3, quantized=True)
    objective = CAUSAL_LM.build_objective(model, autocast_dtype=torch.bfloat16)
    for module in objective.modules():
        if hasattr(module, "quant_state"):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    fuse_layers(model)
    return objective


@pytest.mark.parametrize("build", [with_dora, computed_in_fp32])
def test_dropout_off_the_fused_path_is_a_micro_batches_own(
    monkeypatch: pytest.MonkeyPatch, build: Callable[[], Objective]
) -> None:
    """Whichever thread is late, the same values are dropped: two equal runs are the same run."""
    torch.set_num_threads(2)
    objective = build()
    assert may_run(objective) and not may_run(objective, checkpointing=True)
    batches, found = batches_of(Rows(6), 6), []
    for late in (0, 1, 3):
        differentiate = InThreads._differentiate

        def wait(self: InThreads, batch: Batch, *arguments: Any) -> Any:
            time.sleep(0.05 if batch is batches[late] else 0.0)  # noqa: B023
            return differentiate(self, batch, *arguments)  # noqa: B023

        torch.manual_seed(4)
        with monkeypatch.context() as patch, InThreads(objective, 2) as threads:
            patch.setattr(InThreads, "_differentiate", wait)
            threads.accumulate(batches, 1.0)
        found.append([parameter.grad for parameter in threads.parameters])
        objective.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    torch.manual_seed(5)
    with InThreads(objective, 2) as threads:
        threads.accumulate(batches, 1.0)
    assert any(not torch.equal(p.grad, g) for p, g in zip(threads.parameters, found[0], strict=True))


def test_the_seeds_are_drawn_before_any_thread_begins(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpointing's second forward sets torch's generator and sets it back: a seed drawn meanwhile would be lost."""
    trainer, begun = job("run").trainer(), []
    differentiate = InThreads._differentiate

    def note(self: InThreads, *arguments: Any) -> Any:
        begun.append(torch.get_rng_state())
        return differentiate(self, *arguments)

    monkeypatch.setattr(InThreads, "_differentiate", note)
    with InThreads(trainer.executor.objective, 2) as threads:
        threads.accumulate(batches_of(trainer.cutter.examples, 6), 1.0)
    assert all(torch.equal(state, torch.get_rng_state()) for state in begun)


def test_fp16s_loss_scale_is_in_the_gradients_of_threads_too(job: Callable[..., Job]) -> None:
    trainer = job("run", autocast_dtype=torch.float16).trainer()
    batches = batches_of(trainer.cutter.examples, 3)
    with InThreads(trainer.executor.objective, 2) as threads:
        threads.accumulate(batches, 100.0)
    scaled = [parameter.grad for parameter in threads.parameters]
    trainer.executor.objective.zero_grad(set_to_none=True)
    trainer.executor.accumulate(batches, 100.0)
    for ours, parameter in zip(scaled, trainer.executor.parameters, strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=2e-2, atol=1.0)
    assert max(float(gradient.abs().max()) for gradient in scaled) > 100


def test_adapters_dropout_is_drawn_apart_and_whose_turn_it_is_does_not_matter(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    trainer = job("run", dropout=0.3).trainer()
    fuse_layers(trainer.executor.objective.model)
    assert may_run(trainer.executor.objective)
    assert not may_run(trainer.executor.objective, checkpointing=True)  # a second forward drops other values
    batches = batches_of(trainer.cutter.examples, 6)
    found = []
    for delays in ((0.0, 0.0), (0.05, 0.0)):
        differentiate = InThreads._differentiate

        def late(self: InThreads, batch: Batch, *arguments: Any) -> Any:
            time.sleep(delays[0] if batch is batches[0] else delays[1])  # noqa: B023
            return differentiate(self, batch, *arguments)  # noqa: B023

        torch.manual_seed(4)
        with monkeypatch.context() as patch:
            patch.setattr(InThreads, "_differentiate", late)
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
    assert (old.micro_batches_at_once, old.later.tokens_at_once, old.is_settled) == (1, 64, True)
    new = ResolvedPlan.from_json({**values, "micro_batches_at_once": 3})
    assert ResolvedPlan.from_json(new.to_json()).later.tokens_at_once == 192
