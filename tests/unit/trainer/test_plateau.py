"""The learning rate falls as torch's ReduceLROnPlateau says, from the best weights if so asked, and resumes so."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit.contracts import Silent
from lorafit.errors import StoppedBySignal
from lorafit.kinds.schedules import learning_rate_at, schedules
from lorafit.trainer.held_out import Cadence, HeldOut, OnPlateau
from lorafit.trainer.state import Plateau, TrainState
from tests.support.tiny_run import Job, Rows, TinyPlan
from tests.unit.trainer.test_loop_resume import stop_at, without_times

BETTER_THEN_WORSE = (3.0, 2.0, 2.5, 2.6, 2.1, 2.2, 2.3, 2.4)
PLAN = TinyPlan(total_steps=8, save_every_steps=2, evaluate_every_steps=1)


@pytest.mark.parametrize("better", ["lower", "higher"])
@pytest.mark.parametrize("min_delta", [0.0, 0.2])
def test_it_falls_when_torchs_does(better: str, min_delta: float) -> None:
    draw = random.Random(0)
    rule, state = OnPlateau(patience=3, min_delta=min_delta, factor=0.5, at_most=99), TrainState()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        "min" if better == "lower" else "max",
        factor=0.5,
        patience=2,  # "more than" there, "so many" here
        threshold=min_delta,
        threshold_mode="abs",
        eps=0.0,
    )
    for _ in range(60):
        value = draw.random()
        theirs.step(value)
        rule.follow(state, value, -1.0 if better == "lower" else 1.0)
        assert state.plateau.factor == optimizer.param_groups[0]["lr"]
    assert state.plateau.times > 5


def test_it_falls_no_more_than_so_often() -> None:
    rule, state = OnPlateau(patience=1, at_most=3), TrainState()
    fell = [rule.follow(state, 1.0, -1.0) for _ in range(20)]
    assert (sum(fell), state.plateau) == (3, Plateau(0.125, 1.0, 16, 3))


@pytest.mark.parametrize(
    ("patience", "min_delta", "says"),
    [
        (1, 0.5, "1 evaluation without a loss better by more than 0.5: "),
        (2, 0.0, "2 evaluations without a better loss: "),
    ],
)
def test_it_says_how_much_better_would_have_been_enough(patience: int, min_delta: float, says: str) -> None:
    said: list[str] = []
    reporter = Silent()
    reporter.info = said.append  # type: ignore[method-assign]
    judge = HeldOut(dict, "loss", on_plateau=OnPlateau(patience, min_delta)).judge
    state, cadence = TrainState(), Cadence(9, 1, 1)
    for _ in range(patience + 1):
        judge(state, {"loss": 2.0}, cadence, reporter)
    assert len(said) == 1 and says in said[0]


def falling(job: Callable[..., Job], name: str, *, go_back: bool = True) -> Job:
    """A run whose evaluations give those values, whatever it learns."""
    made: Job = job(name, dropout=0.2, rows=Rows(24), batch_size=8, plan=PLAN, keep_last=1)

    def evaluate() -> dict[str, float]:
        steps = [line["step"] for line in made.lines() if "loss" in line]
        return {"loss": BETTER_THEN_WORSE[steps[-1] - 1]}

    made.held_out = HeldOut(evaluate, "loss", on_plateau=OnPlateau(2, factor=0.1, at_most=2, go_back=go_back))
    return made


def weights(job: Job) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in job.model.parameters() if parameter.requires_grad]


def watched(job: Job, trainer: Any) -> dict[int, Sequence[torch.Tensor]]:
    """Weights behind each edge, where whatever follows from its evaluation has been done."""
    seen, finish = {}, trainer._finish_edge

    def look(state: TrainState) -> None:
        finish(state)
        seen[state.step] = weights(job)

    trainer._finish_edge = look
    return seen


def test_the_rate_falls_and_the_best_weights_come_back(job: Callable[..., Job]) -> None:
    """Steps 3 and 4 are worse than 2, and 5 and 6 too; 7 and 8 change nothing any more."""
    run = falling(job, "run")
    trainer = run.trainer()
    seen = watched(run, trainer)
    result = trainer.fit(TrainState())
    lines = run.lines()
    factors = [line["rate_factor"] for line in lines if "rate_factor" in line]
    assert [(line["step"], line["went_back_to"]) for line in lines if "went_back_to" in line] == [(4, 2), (6, 2)]
    assert factors == pytest.approx([0.1, 0.01])
    schedule = schedules.make_section("cosine", warmup_steps=2)
    planned = [learning_rate_at(schedule, run.learning_rate, step, 8) for step in range(1, 9)]
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates == pytest.approx([r * f for r, f in zip(planned, [1] * 4 + [0.1] * 2 + [0.01] * 2, strict=True)])
    for step in (4, 6):
        assert all(torch.equal(*pair) for pair in zip(seen[step], seen[2], strict=True))
    assert not any(torch.equal(*pair) for pair in zip(seen[3], seen[2], strict=True))
    assert (result.steps, result.adapter_step) == (8, 2)
    moments = next(iter(trainer.update.optimizer.state.values()))
    assert int(moments["step"]) == 4  # two steps to the best, and two from there


def test_without_going_back_only_the_rate_falls(job: Callable[..., Job]) -> None:
    run = falling(job, "run", go_back=False)
    trainer = run.trainer()
    seen = watched(run, trainer)
    trainer.fit(TrainState())
    assert not any("went_back_to" in line for line in run.lines())
    assert sum("rate_factor" in line for line in run.lines()) == 2
    assert not any(torch.equal(*pair) for pair in zip(seen[4], seen[2], strict=True))


@pytest.mark.parametrize("step", [4, 5, 6])
def test_a_run_that_went_back_resumes_bit_for_bit(job: Callable[..., Job], step: int) -> None:
    """Stopped in the step before it, in the one behind it, and in the second time's."""
    whole, parts = falling(job, "whole"), falling(job, "parts")
    whole.trainer().fit(TrainState())
    trainer = parts.trainer()
    stop_at(trainer, step=step, micro_batch=1)
    with pytest.raises(StoppedBySignal):
        trainer.fit(TrainState())
    trainer, state = parts.resume()
    trainer.fit(state)
    assert parts.files(8) == whole.files(8) and parts.files(2) == whole.files(2)
    assert without_times(parts.lines()) == without_times(whole.lines())


def test_a_killed_run_goes_back_again(job: Callable[..., Job], tmp_path: Path) -> None:
    """Nothing of step 5 was saved: it goes on from step 4's checkpoint, which is of the weights it went back to."""
    whole, parts = falling(job, "whole"), falling(job, "parts")
    for run in (whole, parts):
        run.keep_last = 9
        run.trainer().fit(TrainState())
    trainer, state = parts.resume(4)
    assert state.plateau == Plateau(0.1, 2.0, 0, 1)
    trainer.fit(state)
    assert parts.files(8) == whole.files(8)
    assert without_times(parts.lines()) == without_times(whole.lines())


def test_a_state_of_an_earlier_version_has_no_plateau() -> None:
    values = TrainState(step=3).to_json()
    del values["plateau"]
    assert TrainState.from_json(values) == TrainState(step=3)
