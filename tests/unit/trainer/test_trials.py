"""The first steps try ways of running; which is tried when is told before, and what is chosen is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lorafit.data.batch import StepRows, cut_step
from lorafit.data.packing import Cutter
from lorafit.plan import ResolvedPlan, Way
from lorafit.trainer.checkpoint import Checkpoint
from lorafit.trainer.executor import Executor
from lorafit.trainer.loop import Trainer
from lorafit.trainer.state import TrainState
from lorafit.trainer.threaded_micro_batches import InThreads
from lorafit.trainer.trials import forget_trials, note_trial, settle, try_in_turn
from tests.support.tiny_run import CAUSAL_LM, PAD, Job, Rows, set_rate
from tests.unit.trainer.test_loop_resume import without_times

A, B, C = Way("eager", 160), Way("sdpa", 64, 2), Way("fused", 64)
TRIED = {"first_steps": [A, B, C, A, B, C], "is_settled": False}


class Killed(BaseException):
    """As if the process was killed here."""


def plan_of(*ways: Way) -> ResolvedPlan:
    blank = ResolvedPlan(1, 64, "eager", False, "fp32", "fp32", "cpu", 1, "rehearsal", {"seconds": 1.0})
    return try_in_turn(blank, ways)


def settled(seconds: dict[Way, float]) -> Way:
    """What is chosen where a way takes so many seconds for all that a step holds, however it is cut."""
    rows, plan = Rows(44), plan_of(*seconds)
    steps, cutter = StepRows(rows, 0, 16), Cutter(rows, CAUSAL_LM, PAD)
    whole = [row for step in range(1, 5) for row in steps.rows(step)[1]]
    for step, way in enumerate(plan.first_steps, 1):
        own = replace(cutter, attention=way.attention, at_once=way.micro_batches_at_once)
        parts = [own.cut(steps.rows(number)[1], way.micro_batch_tokens) for number in range(1, 5)]
        plan = note_trial(plan, step, seconds[way], sum(own.span_tokens(part) for part in parts))
    chosen = settle(plan, cutter, steps)
    assert chosen.is_settled and chosen.first_steps == plan.first_steps and chosen.measured["seconds"] == 1.0
    rates = {tuple(tried.values())[:3]: tried["tokens_per_second"] for tried in chosen.measured["tried"]}
    tokens = sum(rows.lengths[row] for row in whole)
    for way, took in seconds.items():
        key = (way.attention, way.micro_batch_tokens, way.micro_batches_at_once)
        assert rates[key] == pytest.approx(tokens / took, abs=0.1)
    return chosen.later


def test_each_way_is_tried_twice_in_turn() -> None:
    plan = plan_of(A, B, C)
    assert [plan.way(step) for step in range(1, 9)] == [A, B, C, A, B, C, A, A]
    assert ResolvedPlan.from_json(plan.to_json()) == plan
    alone = plan_of(A)
    assert alone.is_settled and not alone.first_steps and alone.way(1) == A


@pytest.mark.parametrize(
    ("seconds", "taken"),
    [
        ({A: 2.0, B: 1.0}, B),
        ({Way("sdpa", 40): 1.04, Way("sdpa", 80): 1.0, Way("sdpa", 160): 0.999}, Way("sdpa", 40)),
        ({Way("sdpa", 40): 1.1, Way("sdpa", 80): 1.0, Way("sdpa", 160): 0.999}, Way("sdpa", 80)),
        ({Way("sdpa", 64): 1.0, Way("eager", 64): 0.93}, Way("sdpa", 64)),
        ({Way("sdpa", 64): 1.0, Way("eager", 64): 0.85}, Way("eager", 64)),
    ],
)
def test_the_fastest_is_taken_with_the_fewest_tokens_and_eager_only_where_it_pays(
    seconds: dict[Way, float], taken: Way
) -> None:
    assert settled(seconds) == taken


def test_a_first_time_does_not_count_where_a_second_is_faster_nor_a_step_that_ran_out_of_memory() -> None:
    rows, plan = Rows(44), plan_of(A, B)
    for step, seconds in enumerate([9.0, 2.0, 1.0, None], 1):
        plan = note_trial(plan, step, seconds, 100)
    assert settle(plan, Cutter(rows, CAUSAL_LM, PAD), StepRows(rows, 0, 16)).later == A
    assert note_trial(plan, 5, 1.0, 100) == plan  # no trial
    assert forget_trials(plan).measured == {"seconds": 1.0}


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """Plants what each step takes for a token; the rest take 9 s."""

    def plant(planted: dict[int, float]) -> None:
        def note(plan: ResolvedPlan, step: int, _: float | None, span_tokens: int) -> ResolvedPlan:
            return note_trial(plan, step, planted.get(step, 9.0) * span_tokens, span_tokens)

        monkeypatch.setattr("lorafit.trainer.loop.note_trial", note)

    return plant


def run_to_end(job: Job) -> ResolvedPlan:
    trainer = job.trainer()
    trainer.fit(TrainState())
    return trainer.plan


def go_on(job: Job, step: int) -> Trainer:
    """A resume from that checkpoint, with its plan."""
    trainer, state = job.resume(step)
    trainer.snapshot = replace(trainer.snapshot, resolved=saved_plan(job.store.open(step)))
    trainer.fit(state)
    return trainer


def saved_plan(checkpoint: Checkpoint | None) -> ResolvedPlan:
    assert checkpoint is not None
    return ResolvedPlan.from_json(checkpoint.resolved)


def test_each_step_runs_as_the_plan_says(
    job: Callable[..., Job], seconds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention, cut and number at once, of the batches that are built ahead too; and the choice from step 7 on."""
    seconds({2: 1.0})
    one, seen = job(trials=TRIED), []

    def note(self: Executor, batches: Any, *rest: Any) -> Any:
        attention = self.objective.base.config._attn_implementation
        at_once = self.count if isinstance(self, InThreads) else 1
        seen.append((attention, [batch.rows for batch in batches], at_once))
        return inner[type(self)](self, batches, *rest)

    inner = {Executor: Executor.accumulate, InThreads: InThreads.accumulate}
    for kind in inner:
        monkeypatch.setattr(kind, "accumulate", note)
    trainer, told = one.trainer(), []
    trainer.on_settled = lambda plan: told.append((len(seen), plan))
    trainer.fit(TrainState())
    wanted = []
    for step, way in enumerate([A, B, C, A, B, C, B, B], 1):
        cut = cut_step(
            trainer.step_rows.rows(step)[1], one.rows.lengths, way.micro_batch_tokens, way.micro_batches_at_once
        )
        wanted.append((way.attention, [tuple(part) for part in cut], way.micro_batches_at_once))
    assert [(name, [tuple(rows) for rows in cut], at_once) for name, cut, at_once in seen] == wanted
    assert [steps for steps, _ in told] == [6] and told[0][1] == trainer.plan and trainer.plan.later == B
    assert saved_plan(one.store.open(4)).is_settled is False and saved_plan(one.store.open(8)) == trainer.plan


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_killed_among_the_trials_and_resumed_is_the_same_run(
    job: Callable[..., Job], seconds: Any, dropout: float
) -> None:
    """What was measured before the kill counts on: C was the fastest then, and A would be by the rest alone."""
    seconds({3: 1.0, 4: 5.0})
    whole, parts = job("whole", trials=TRIED, dropout=dropout), job("parts", trials=TRIED, dropout=dropout)
    assert run_to_end(whole).later == C
    trainer = parts.trainer()
    inner = trainer.update.learning_rate_at

    def kill(step: int) -> float:
        if step == 6:
            raise Killed
        return inner(step)

    set_rate(trainer, kill)
    with pytest.raises(Killed):
        trainer.fit(TrainState())
    seconds({4: 5.0})
    assert go_on(parts, 4).plan.later == C
    assert parts.files(8) == whole.files(8) and len(whole.files(8)) == 2
    assert without_times(parts.lines()) == without_times(whole.lines())


def test_a_settled_plan_repeats_the_run_and_measures_nothing(job: Callable[..., Job], seconds: Any) -> None:
    seconds({2: 1.0})
    first = job("first", trials=TRIED, dropout=0.3)
    plan = run_to_end(first)
    seconds({1: 1.0})
    again = job("again", trials={"first_steps": plan.first_steps, "is_settled": True}, dropout=0.3)
    trainer = again.trainer()
    trainer.snapshot = replace(trainer.snapshot, resolved=plan)
    trainer.fit(TrainState())
    assert trainer.plan == plan and again.files(8) == first.files(8)
