"""A resumed run is the same run, bit for bit."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit.errors import CheckpointError, StoppedBySignal
from lorafit.trainer.held_out import HeldOut
from lorafit.trainer.state import TrainState
from tests.support.tiny_run import Job, Rows, TinyPlan, set_rate


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def stop_at(trainer: Any, *, step: int, micro_batch: int) -> None:
    """Sends this process a SIGTERM behind that micro-batch of that step."""
    seen = {"rows": 0}
    take, inner = trainer.feed.take, trainer.executor.objective.forward

    def counting(number: int, budget: int) -> Any:
        seen["step"], seen["rows"] = number, 0
        return take(number, budget)

    trainer.feed.take = counting

    def forward(batch: Any) -> Any:
        seen["rows"] += 1
        if seen.get("step") == step and seen["rows"] == micro_batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(batch)

    trainer.executor.objective.forward = forward


def long_job(job: Callable[..., Job], name: str, kind: str = "adamw", ratio: float = 1.0) -> Job:
    def evaluate() -> dict[str, float]:
        torch.rand(3)  # evaluation draws; the training must not notice
        return {"loss": 1.0}

    return job(
        name,
        dropout=0.3,
        rows=Rows(40),
        plan=TinyPlan(total_steps=9, save_every_steps=2, evaluate_every_steps=3),
        optimizer={"kind": kind},
        rate_factor=lambda name: ratio if "lora_B" in name else 1.0,
        held_out=HeldOut(evaluate),
    )


@pytest.mark.parametrize(
    ("kind", "ratio"),
    [("adamw", 1.0), ("paged_adamw_8bit", 16.0), ("adafactor", 1.0), ("rmsprop_bnb_8bit", 4.0)],
)
def test_stopped_four_times_and_resumed_is_bit_identical(job: Callable[..., Job], kind: str, ratio: float) -> None:
    whole = long_job(job, "whole", kind, ratio)
    whole.trainer().fit(TrainState())
    parts = long_job(job, "parts", kind, ratio)
    trainer, state = parts.trainer(), TrainState()
    for step, micro_batch in ((1, 1), (4, 3), (5, 2), (9, 1)):
        stop_at(trainer, step=step, micro_batch=micro_batch)
        with pytest.raises(StoppedBySignal, match=rf"stopped by SIGTERM: saved step {step - 1}") as stopped:
            trainer.fit(state)
        assert stopped.value.exit_code == 128 + 15
        trainer, state = parts.resume()
        assert state.step == step - 1
    result = trainer.fit(state)
    assert (result.steps, result.was_complete) == (9, False)
    assert parts.files(9) == whole.files(9) and len(whole.files(9)) == 2
    assert without_times(parts.lines()) == without_times(whole.lines())
    assert [line["step"] for line in parts.lines()] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9]


def test_killed_without_a_word_goes_on_from_the_last_checkpoint(job: Callable[..., Job]) -> None:
    whole, killed = long_job(job, "whole"), long_job(job, "killed")
    whole.trainer().fit(TrainState())

    class Killed(BaseException):
        pass

    trainer = killed.trainer()
    inner = trainer.update.learning_rate_at
    set_rate(trainer, lambda step: inner(step) if step < 8 else (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        trainer.fit(TrainState())
    with (killed.root / "metrics.jsonl").open("a") as log:
        log.write('{"step": 8, "lo')  # a line cut off in the middle
    assert [line["step"] for line in killed_lines(killed)] == [1, 2, 3, 3, 4, 5, 6, 6, 7]
    trainer, state = killed.resume()
    assert state.step == 6
    trainer.fit(state)
    assert killed.files(9) == whole.files(9)
    assert without_times(killed.lines()) == without_times(whole.lines())


def killed_lines(job: Job) -> list[dict[str, Any]]:
    text = (job.root / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()[:-1]]


def test_evaluating_changes_nothing(job: Callable[..., Job]) -> None:
    with_it, without = long_job(job, "with"), long_job(job, "without")
    without.held_out = None
    with_it.trainer().fit(TrainState())
    without.trainer().fit(TrainState())
    assert with_it.files(9) == without.files(9)


def test_a_finished_run_is_left_as_it_is(job: Callable[..., Job]) -> None:
    one = long_job(job, "one")
    one.trainer().fit(TrainState())
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in one.root.rglob("*") if f.is_file()}
    trainer, state = one.resume()
    result = trainer.fit(state)
    assert result.was_complete and result.steps == 9
    assert {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in one.root.rglob("*") if f.is_file()} == before


def test_a_longer_run_passes_through_the_same_weights(job: Callable[..., Job]) -> None:
    """A constant schedule, more steps: the checkpoint at the old end is the same."""
    short, long = long_job(job, "short"), long_job(job, "long")
    for one, steps in ((short, 4), (long, 6)):
        one.plan = replace(one.plan, total_steps=steps)
        trainer = one.trainer()
        set_rate(trainer, lambda _: 1e-2)
        trainer.fit(TrainState())
    assert short.files(4) == long.files(4)
    short.plan = replace(short.plan, total_steps=6)
    trainer, state = short.resume()
    set_rate(trainer, lambda _: 1e-2)
    trainer.fit(state)
    assert short.files(6) == long.files(6)


def test_a_damaged_checkpoint_is_skipped_and_kept(job: Callable[..., Job]) -> None:
    whole, one = long_job(job, "whole"), long_job(job, "one")
    whole.trainer().fit(TrainState())
    one.trainer().fit(TrainState())
    last = one.root / "checkpoints" / "step-000009"
    flip(last / "optimizer.safetensors")
    trainer, state = one.resume()
    assert state.step == 8
    assert "step-000009" in one.reporter.warnings[0] and "falling back to step 8" in one.reporter.warnings[0]
    assert "checksum" in one.reporter.warnings[0] and last.is_dir()
    trainer.fit(state)
    assert one.files(9) == whole.files(9)
    assert (one.root / "checkpoints" / "damaged-step-000009").is_dir()
    with pytest.raises(CheckpointError, match="step 7"):
        one.resume(7)
    flip(last / "state.json")
    with pytest.raises(CheckpointError, match=r"step 9: state.json does not match its checksum"):
        one.resume(9)
    for folder in (one.root / "checkpoints").glob("step-*"):
        flip(folder / "MANIFEST")
    with pytest.raises(CheckpointError, match="no usable checkpoint; step-000009") as none:
        one.resume()
    assert none.value.exit_code == 6


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_going_back_to_an_older_step_sets_later_ones_aside(job: Callable[..., Job]) -> None:
    whole, one = long_job(job, "whole"), long_job(job, "one")
    whole.trainer().fit(TrainState())
    one.trainer().fit(TrainState())
    trainer, state = one.resume(8)
    assert [line["step"] for line in one.lines()] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8]
    assert one.store.open().state.step == 8  # type: ignore[union-attr]
    trainer.fit(state)
    assert one.files(9) == whole.files(9)


def test_another_adapter_or_optimizer_is_refused(job: Callable[..., Job]) -> None:
    one = long_job(job, "one")
    one.trainer().fit(TrainState())
    one.optimizer = {"kind": "sgd"}
    with pytest.raises(CheckpointError, match="holds the state of AdamW"):
        one.resume()
