"""Faults while training: what is said, what is saved, and that nothing is left half done."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit.errors import NumericsError, ResourceError, StoppedBySignal
from lorafit.files import atomic
from lorafit.trainer.executor import Executor
from lorafit.trainer.held_out import HeldOut
from lorafit.trainer.signals import StopSignals
from lorafit.trainer.state import TrainState
from tests.support.tiny_run import Job, Rows, TinyPlan, set_rate


def poison_loss(trainer: Any, value: float, from_step: int) -> None:
    """Multiplies the loss of that step and later ones."""
    take, inner = trainer.feed.take, trainer.executor.objective.forward
    current = {"step": 0}

    def counting(step: int, budget: int) -> Any:
        current["step"] = step
        return take(step, budget)

    def forward(batch: Any) -> Any:
        result = inner(batch)
        return result._replace(loss_sum=result.loss_sum * value) if current["step"] >= from_step else result

    trainer.feed.take, trainer.executor.objective.forward = counting, forward


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_before_the_optimizer(job: Callable[..., Job], value: float) -> None:
    good, bad = (job(name, dropout=0.1, plan=TinyPlan(total_steps=6, save_every_steps=4)) for name in ("good", "bad"))
    trainer = bad.trainer()
    poison_loss(trainer, value, from_step=5)
    with pytest.raises(NumericsError, match=r"step 5: non-finite loss \((nan|inf)\) in the .* rows.jsonl:\d+") as error:
        trainer.fit(TrainState())
    assert error.value.exit_code == 9 and len(str(error.value)) < 300
    assert [line["step"] for line in bad.lines()] == [1, 2, 3, 4]
    good.trainer().fit(TrainState())
    assert good.files(4) == bad.files(4)
    trainer, state = bad.resume()
    trainer.fit(state)
    assert good.files(6) == bad.files(6)


def test_a_gradient_that_is_not_finite_is_named(job: Callable[..., Job]) -> None:
    one = job()
    trainer = one.trainer()
    name, parameter = trainer.update.named[3]
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    before = [p.detach().clone() for p in trainer.executor.parameters]
    with pytest.raises(NumericsError, match=f"step 1: non-finite gradient .* in {name}"):
        trainer.fit(TrainState())
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.executor.parameters, strict=True))
    assert trainer.update.optimizer.state == {} and not (one.root / "metrics.jsonl").exists()


def test_a_metric_that_is_not_finite_ends_the_run(job: Callable[..., Job]) -> None:
    one = job(plan=TinyPlan(evaluate_every_steps=2), held_out=HeldOut(lambda: {"loss": float("nan")}))
    with pytest.raises(NumericsError, match="step 2: evaluation gave a non-finite loss"):
        one.trainer().fit(TrainState())
    assert "NaN" not in (one.root / "metrics.jsonl").read_text()


def test_fp16_overflows_are_skipped_steps(job: Callable[..., Job]) -> None:
    one = job(autocast_dtype=torch.float16, plan=TinyPlan(total_steps=12, save_every_steps=2))
    trainer = one.trainer()
    scaler = trainer.executor.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**26})  # overflows until it has backed off
    state = TrainState()
    trainer.fit(state)
    lines, whole = one.lines(), one.files(12)
    skipped = [line["step"] for line in lines if line["grad_norm"] is None]
    assert skipped == list(range(1, len(skipped) + 1)) and 1 <= len(skipped) == state.overflows < 12
    assert state.overflows_in_row == 0 and state.scaler["scale"] == 2.0 ** (26 - len(skipped))
    assert one.reporter.warnings == []
    _, resumed = one.resume()
    assert (resumed.overflows, repr(resumed.scaler)) == (state.overflows, repr(state.scaler))  # whole numbers stay so
    trainer, state = one.resume(10)
    trainer.fit(state)
    assert one.files(12) == whole


def test_fp16_that_overflows_for_good_ends_the_run(job: Callable[..., Job]) -> None:
    one = job(autocast_dtype=torch.float16, plan=TinyPlan(total_steps=40, save_every_steps=100))
    trainer = one.trainer()
    next(iter(trainer.executor.parameters)).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NumericsError, match=r"step 20: .* 20 times in a row, 20 skipped steps .* loss scale") as error:
        trainer.fit(TrainState())
    assert error.value.exit_code == 9
    assert one.store.open().state.step == 19  # type: ignore[union-attr]


def test_the_loss_scale_is_read_only_where_it_is_told(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card the host waits for it."""
    trainer = job(autocast_dtype=torch.float16).trainer()
    scaler, asked = trainer.executor.scaler, []
    scale = scaler.get_scale()
    monkeypatch.setattr(scaler, "get_scale", lambda: asked.append(True) or scale)
    state = TrainState()
    with trainer.journal.tracking(1, 0, trainer.executor.device):
        trainer._take_step(state)
    assert state.step == 1 and state.overflows == 0
    assert asked == []


def test_fp16_learns_like_fp32(job: Callable[..., Job]) -> None:
    logs = []
    for name, dtype in (("fp32", None), ("fp16", torch.float16)):
        one = job(name, autocast_dtype=dtype, plan=TinyPlan(total_steps=6, save_every_steps=100))
        one.trainer().fit(TrainState())
        logs.append([line["loss"] for line in one.lines()])
    assert logs[1] == pytest.approx(logs[0], rel=2e-3) and logs[0] != logs[1]


def run_out_of_memory(monkeypatch: pytest.MonkeyPatch, *, above_tokens: int, error: Exception) -> None:
    """Micro-batches of more padded tokens than that do not fit, once some of the step is done."""

    accumulate = Executor.accumulate

    def limited(self: Executor, batches: Any, *rest: Any) -> Any:
        if any(batch.padded_tokens > above_tokens for batch in batches):
            accumulate(self, batches[:1], *rest)
            raise error
        return accumulate(self, batches, *rest)

    monkeypatch.setattr(Executor, "accumulate", limited)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_an_out_of_memory_halves_the_budget_and_repeats_the_step(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    small = job("small", dropout=0.2, budget=80)
    small.trainer().fit(TrainState())
    one = job("one", dropout=0.2, budget=160)
    run_out_of_memory(monkeypatch, above_tokens=80, error=error)
    state = TrainState()
    one.trainer().fit(state)
    assert state.events == [{"kind": "out_of_memory", "step": 1, "micro_batch_tokens": 80}]
    assert "out of memory at step 1" in one.reporter.warnings[0] and len(one.reporter.warnings) == 1
    assert one.files(8) == small.files(8)  # as if it had been planned so, random numbers too
    _, resumed = one.resume()
    assert resumed.token_budget(160) == 80


def test_an_out_of_memory_on_single_rows_ends_the_run(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    one = job(budget=160)
    run_out_of_memory(monkeypatch, above_tokens=0, error=torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(ResourceError, match=r"out of memory at step 1: seq length \d+.*lower training") as error:
        one.trainer().fit(TrainState())
    assert error.value.exit_code == 7


def test_other_errors_are_not_taken_for_memory(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    run_out_of_memory(monkeypatch, above_tokens=0, error=RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        job().trainer().fit(TrainState())


def test_the_best_checkpoint_outlives_rotation_and_becomes_the_adapter(job: Callable[..., Job]) -> None:
    losses = iter([3.0, 1.0, 2.0, 1.5, 1.4, 1.3])
    one = job(
        plan=TinyPlan(total_steps=10, evaluate_every_steps=2, save_every_steps=1),
        held_out=HeldOut(lambda: {"loss": next(losses)}, "loss"),
    )
    result = one.trainer().fit(TrainState())
    folders = sorted(p.name for p in (one.root / "checkpoints").iterdir())
    assert folders == ["step-000004", "step-000009", "step-000010"]
    assert result.adapter_step == 4 and result.best is not None and result.best.value == 1.0
    assert json.loads((one.root / "best.json").read_text()) == {"step": 4, "metric": "loss", "value": 1.0}
    published = (one.root / "adapter" / "adapter_model.safetensors").read_bytes()
    assert published == one.files(4)["adapter_model.safetensors"] != one.files(10)["adapter_model.safetensors"]


@pytest.mark.parametrize("patience", [2, None])
@pytest.mark.parametrize(
    ("rouge", "said"),
    [([0.0, 0.0, 0.0], True), ([0.0, 0.1, 0.1], False), ([0.5, 0.1, 0.2], False)],
)
def test_a_metric_that_never_moved_is_told_of_at_the_end(
    job: Callable[..., Job], patience: int | None, rouge: list[float], said: bool
) -> None:
    """It keeps the adapter of the first evaluation, however the loss falls meanwhile."""
    values = iter(rouge)
    held_out = HeldOut(lambda: {"rougeL": next(values)}, "rouge", patience=patience)
    one = job(plan=TinyPlan(total_steps=6, evaluate_every_steps=2), held_out=held_out)
    trainer = one.trainer()
    warnings: list[str] = []
    trainer.journal.reporter.warn = warnings.append  # type: ignore[method-assign]
    trainer.fit(TrainState())
    told = [each for each in warnings if "rouge is 0 at the last evaluation as at the first" in each]
    assert len(told) == said and (not said or "the adapter is that of step 2" in told[0])


def test_patience_is_kept_over_a_resume(job: Callable[..., Job]) -> None:
    """Best at step 2, patience 3: the run ends at step 8, broken or not; less than min_delta is no improvement."""
    values = {2: 1.0, 4: 0.995, 6: 1.2, 8: 1.1, 10: 0.1}

    def build(name: str) -> Job:
        one = job(name, plan=TinyPlan(total_steps=12, evaluate_every_steps=2, save_every_steps=1))
        one.held_out = HeldOut(lambda: {"loss": values[one.state.step]}, "loss", patience=3, min_delta=0.01)  # type: ignore[attr-defined]
        return one

    whole, broken = build("whole"), build("broken")
    whole.state = TrainState()  # type: ignore[attr-defined]
    result = whole.trainer().fit(whole.state)  # type: ignore[attr-defined]
    assert (result.steps, result.stopped_early, result.adapter_step) == (8, True, 4)

    trainer = broken.trainer()
    broken.state = TrainState()  # type: ignore[attr-defined]
    poison_loss(trainer, float("nan"), from_step=7)
    with pytest.raises(NumericsError):
        trainer.fit(broken.state)  # type: ignore[attr-defined]
    trainer, broken.state = broken.resume()  # type: ignore[attr-defined]
    assert broken.state.evaluations_without_improvement == 2  # type: ignore[attr-defined]
    result = trainer.fit(broken.state)  # type: ignore[attr-defined]
    assert (result.steps, result.stopped_early) == (8, True)
    trainer, broken.state = broken.resume()  # type: ignore[attr-defined]
    assert trainer.fit(broken.state).was_complete  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_signals_save_the_edge_and_handlers_are_restored(job: Callable[..., Job], name: str) -> None:
    number = getattr(signal, name)
    one = job()
    trainer = one.trainer()
    set_rate(trainer, lambda step: 1e-3 if step < 3 else os.kill(os.getpid(), number) or 1e-3)
    said: list[str] = []
    trainer.signals = StopSignals(said.append)
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(StoppedBySignal, match=f"stopped by {name}: saved step 3") as stopped:
        trainer.fit(TrainState())
    assert stopped.value.exit_code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
    assert one.store.open().state.step == 3  # type: ignore[union-attr]
    (told,) = said
    assert told.startswith("stopping: saving a checkpoint") and ("Ctrl-C" in told) == (name == "SIGINT")


def test_a_signal_ends_an_evaluation_which_the_resume_makes_up_for(job: Callable[..., Job]) -> None:
    whole, one = (
        job(name, plan=TinyPlan(total_steps=6, evaluate_every_steps=3), held_out=HeldOut(lambda: {"loss": 1.0}))
        for name in ("whole", "one")
    )
    whole.trainer().fit(TrainState())
    trainer = one.trainer()

    def interrupted() -> dict[str, float]:
        torch.rand(2)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the evaluation went on")

    trainer.held_out = HeldOut(interrupted)
    with pytest.raises(StoppedBySignal, match="saved step 3"):
        trainer.fit(TrainState())
    assert [line["step"] for line in one.lines()] == [1, 2, 3]
    trainer, state = one.resume()
    trainer.fit(state)
    assert [line["step"] for line in one.lines()] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert one.files(6) == whole.files(6)


def test_a_second_interrupt_ends_at_once(job: Callable[..., Job]) -> None:
    one = job()
    trainer = one.trainer()
    inner = trainer.snapshot.save_adapter

    def slow_save(folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        inner(folder)

    trainer.cadence = replace(trainer.cadence, save_every_steps=2)
    save_slowly = lambda folder: (inner if "step-000000" in folder.parent.name else slow_save)(folder)  # noqa: E731
    trainer.snapshot = replace(trainer.snapshot, save_adapter=save_slowly)
    with pytest.raises(StoppedBySignal, match="not saved") as stopped:
        trainer.fit(TrainState())
    assert stopped.value.exit_code == 130
    assert [p.name for p in (one.root / "checkpoints").iterdir()] == ["step-000000"]


def test_a_signal_while_saving_lets_the_save_finish(job: Callable[..., Job]) -> None:
    one = job(plan=TinyPlan(save_every_steps=3))
    trainer = one.trainer()
    inner = trainer.snapshot.save_adapter
    saves: list[str] = []

    def save(folder: Path) -> None:
        saves.append(folder.parent.name)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        inner(folder)

    trainer.snapshot = replace(trainer.snapshot, save_adapter=save)
    with pytest.raises(StoppedBySignal, match="saved step 3"):
        trainer.fit(TrainState())
    assert len(saves) == 2 and one.store.open().state.step == 3  # type: ignore[union-attr]


def test_a_full_disk_leaves_the_older_checkpoint(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    one = job(plan=TinyPlan(save_every_steps=2), keep_last=1)
    trainer = one.trainer()
    inner = trainer.snapshot.save_adapter

    def save(folder: Path) -> None:
        inner(folder)
        if "step-000004" in folder.parent.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    trainer.snapshot = replace(trainer.snapshot, save_adapter=save)
    with pytest.raises(ResourceError, match="no space left") as error:
        trainer.fit(TrainState())
    assert error.value.exit_code == 7
    assert [p.name for p in (one.root / "checkpoints").iterdir()] == ["step-000002"]
    trainer, state = one.resume()
    assert state.step == 2
    trainer.fit(state)


def test_a_real_file_size_limit_is_a_resource_error(tmp_path: Path) -> None:
    """The limit's errno comes through, and nothing half written is left."""
    import subprocess
    import sys

    code = (
        "import resource, torch; from pathlib import Path; from lorafit.files.atomic import atomic_dir;"
        "from lorafit.trainer.state import write_tensors;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));\n"
        f"with atomic_dir(Path({str(tmp_path)!r}) / 'x') as folder:\n"
        "    write_tensors(folder / 'a.safetensors', {'a': torch.zeros(100_000)})"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ResourceError" in ended.stderr and "file too large" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_disappears_is_said(job: Callable[..., Job]) -> None:
    one = job(plan=TinyPlan(save_every_steps=2))
    trainer = one.trainer()
    set_rate(trainer, lambda step: 1e-3 if step < 2 else shutil.rmtree(one.root) or 1e-3)
    with pytest.raises(ResourceError, match="disappeared"):
        trainer.fit(TrainState())
    assert not one.root.exists()


def test_a_log_that_cannot_be_written_does_not_stop_the_run(job: Callable[..., Job]) -> None:
    one = job(plan=TinyPlan(total_steps=5, save_every_steps=100))
    trainer = one.trainer()
    inner = trainer.journal.log._append
    calls: list[bytes] = []

    def append(data: bytes) -> None:
        calls.append(data)
        if len(calls) in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        inner(data)

    trainer.journal.log._append = append  # type: ignore[method-assign]
    trainer.fit(TrainState())
    assert [w for w in one.reporter.warnings if "log write failed once" in w] == one.reporter.warnings
    assert len(one.reporter.warnings) == 1
    assert [line["step"] for line in one.lines()] == [1, 2, 3, 4, 5]


def test_rotation_that_cannot_delete_warns(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    one = job(plan=TinyPlan(total_steps=3, save_every_steps=1), keep_last=1)
    rename = Path.rename

    def refusing(self: Path, target: Any) -> Path:
        if self.name == "step-000001":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refusing)
    one.trainer().fit(TrainState())
    assert any("could not remove" in w and "step-000001" in w for w in one.reporter.warnings)
    assert sorted(p.name for p in (one.root / "checkpoints").iterdir()) == ["step-000001", "step-000003"]
    assert atomic.check_manifest(one.root / "checkpoints" / "step-000001") is None


def test_foreign_files_and_leftovers(job: Callable[..., Job]) -> None:
    """A user's files stay, a pickle is not opened, what a crash left is removed after the next save."""
    one = job(plan=TinyPlan(total_steps=2, save_every_steps=1), keep_last=1)
    one.trainer().fit(TrainState())
    checkpoints = one.root / "checkpoints"
    (checkpoints / "notes").mkdir()
    (checkpoints / "notes" / "mine.txt").write_text("keep")
    (checkpoints / "step-000002" / "rng_state.pth").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (checkpoints / ".tmp-12").mkdir()
    (checkpoints / ".tmp-12" / "half").write_text("x")
    one.plan = replace(one.plan, total_steps=4)
    trainer, state = one.resume()
    trainer.fit(state)
    assert sorted(p.name for p in checkpoints.iterdir()) == ["notes", "step-000004"]


def test_many_rows_are_cut_in_the_message(job: Callable[..., Job]) -> None:
    one = job(rows=Rows(16), budget=100_000)
    trainer = one.trainer()
    poison_loss(trainer, float("nan"), from_step=1)
    with pytest.raises(NumericsError, match=r"and \d+ more"):
        trainer.fit(TrainState())
