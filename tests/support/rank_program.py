"""What each of several gloo ranks does in `tests/unit/trainer/test_ranks.py`: run after run, in the same order.

    python rank_program.py ROOT

Each run leaves ROOT/NAME.RANK behind: how it ended for that rank, what it was told, and how many micro-batches it had.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from lorafit.errors import LorafitError
from lorafit.plan import ResolvedPlan
from lorafit.trainer.held_out import HeldOut, OnPlateau
from lorafit.trainer.loop import Trainer
from lorafit.trainer.rehearsal import resolve_plan
from lorafit.trainer.stage import Stage
from lorafit.trainer.state import TrainState
from tests.support.tiny_run import KTO, PAD, Job, Pulling, Rows, TinyPlan, VerdictRows, set_rate

SHORT = TinyPlan(total_steps=4, save_every_steps=4, evaluate_every_steps=1)
VALUES = itertools.cycle([1.0, 2.0, 3.0, 4.0])  # of the evaluations of a run, of which it makes that many
WORSE = HeldOut(lambda: {"loss": next(VALUES)}, "loss", on_plateau=OnPlateau(1, factor=0.5, at_most=2, go_back=True))
OF_ONE: dict[str, dict[str, Any]] = {  # trained over ranks, they are the runs of one process
    "uneven": {},
    "one-row": {"batch_size": 1},
    "five-rows": {"batch_size": 3, "rows": Rows(5)},
    "packed": {"packing": True, "batch_size": 5, "budget": 80},
    "hooked": {"hooks": lambda model: [Pulling(model)], "batch_size": 6},
    "falling": {"held_out": WORSE},
    "pooled": {"task": KTO, "rows": VerdictRows(44), "batch_size": 6, "budget": 200},
}


def run_out(gradient: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def be_wrong(gradient: torch.Tensor) -> torch.Tensor:
    raise ValueError("an error of its own")


def befall(trainer: Trainer, what: Callable[[torch.Tensor], torch.Tensor], *, times: int) -> None:
    """Rank 1's first backward passes meet that, each with some gradients done."""
    if trainer.executor.rank == 1:
        left = iter(range(times))
        parameter = trainer.executor.parameters[0]
        parameter.register_hook(lambda gradient: gradient if next(left, None) is None else what(gradient))


def spoil_loss(trainer: Trainer) -> None:
    """Rank 1's loss is not a number from the second step on."""
    executor, state = trainer.executor, trainer.update.optimizer.state

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        spoilt = executor.rank == 1 and len(state)
        return output._replace(loss_sum=output.loss_sum * float("nan")) if spoilt else output

    executor.objective.register_forward_hook(spoil)


def stop_at(trainer: Trainer, stopped: int) -> None:
    """Rank 1 gets a signal in that step."""
    inner, executor = trainer.update.learning_rate_at, trainer.executor

    def rate(step: int) -> float:
        if step == stopped and executor.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(step)

    set_rate(trainer, rate)


def rehearse(one: Job, trainer: Trainer) -> ResolvedPlan:
    """Nothing left open but the size of a micro-batch, 40 tokens at least."""
    plan = SimpleNamespace(
        attention="eager", gradient_checkpointing=False, micro_batch_tokens=None, min_micro_batch_tokens=40,
        max_micro_batch_tokens=320, total_steps=1, dtype="fp32", compute_dtype="fp32", keeps_unpacked=False,
        may_let_go_of_unpacked=False, may_recompute_more=False, loss_chunk_bytes=None,
    )  # fmt: skip
    stage = Stage(trainer.executor, one.rows, None, trainer.step_rows, PAD, one.reporter, lambda wanted: None)
    return resolve_plan(plan, stage)  # type: ignore[arg-type]


def main(root: Path) -> None:
    for name, times in (("rehearsed", 0), ("short-of-memory", 1), ("no-memory", sys.maxsize)):
        one = Job(root / name)
        trainer = one.trainer()
        befall(trainer, run_out, times=times)
        try:
            said: Any = rehearse(one, trainer).to_json()
        except LorafitError as error:
            said = f"{error.exit_code} {error}"
        (root / f"{name}.{trainer.executor.rank}").write_text(json.dumps({"said": said}), encoding="utf-8")
    runs: dict[str, tuple[dict[str, Any], Callable[[Trainer], None]]] = {
        **{name: (values, lambda trainer: None) for name, values in OF_ONE.items()},
        "small": ({"dropout": 0.2, "budget": 80}, lambda trainer: None),
        "ran-out": ({"dropout": 0.2, "budget": 160}, lambda trainer: befall(trainer, run_out, times=1)),
        "exhausted": ({}, lambda trainer: befall(trainer, run_out, times=sys.maxsize)),
        "not-finite": ({}, spoil_loss),
        "stopped": ({}, lambda trainer: stop_at(trainer, 3)),
        "gone": ({}, lambda trainer: befall(trainer, be_wrong, times=1)),
    }
    for name, (values, prepare) in runs.items():
        one = Job(root / name, **{"plan": SHORT, **values})
        trainer, state = one.trainer(), TrainState()
        rank = trainer.executor.rank
        shares = [len(trainer.build_micro_batches(step, one.budget)) for step in range(1, 5)]
        prepare(trainer)
        try:
            trainer.fit(state)
            said = "done"
        except LorafitError as error:
            said = f"{error.exit_code} {error}"
        note = {"said": said, "events": state.events, "warnings": one.reporter.warnings, "shares": shares}
        (root / f"{name}.{rank}").write_text(json.dumps(note), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
