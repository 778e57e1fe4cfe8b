"""Trials: the first steps of a run, each run in one of the ways that are open, so that the rest take the fastest.

How a step is run changes its result by rounding only, so that no step is lost. Which step is run in which way is told
before step 1, by nothing that is measured; what is measured decides about the steps behind them alone, and is written
down before the first of those. So a run that is killed on the way, or repeated by the same plan, is the same run.

    step     1 2 3 1 2 3       each way twice: a first time also sets threads and caches up
    share    at most a tenth of the run: a shorter one takes the first way from its first to its last step
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from lorafit.data.batch import StepRows
from lorafit.data.packing import Cutter
from lorafit.plan import ResolvedPlan, Way

_TURNS = 2
_LEAST_SHARE = 10  # of a run's steps, one in so many
_SAMPLED_STEPS = 4  # what a way would need for the first ones is compared
_EAGER_PAYS = 1.1  # times the best other rate: less is not worth the scores that eager attention keeps
CLOSE_ENOUGH = {"cpu": 0.95, "gpu": 0.97}  # of the best rate: the way that holds fewer tokens at once is taken
_MEASURED = "first_steps_seconds_per_token"


def most_ways(total_steps: int) -> int:
    """How many ways a run may try; 1: it tries none."""
    return max(1, total_steps // (_LEAST_SHARE * _TURNS))


def try_in_turn(plan: ResolvedPlan, ways: Sequence[Way]) -> ResolvedPlan:
    """The plan that begins with these ways; with a single one nothing is left to choose."""
    first_steps = list(ways) * _TURNS if len(ways) > 1 else []
    return replace(plan.running(ways[0]), first_steps=first_steps, is_settled=not first_steps)


def note_trial(plan: ResolvedPlan, step: int, seconds: float | None, span_tokens: int) -> ResolvedPlan:
    """The plan with what a step took, where that step is a trial and the choice is still open.

    Args:
        plan: The run's.
        step: From 1.
        seconds: Of its forwards and backwards; None: memory ran out, it was run in another way.
        span_tokens: What they had to do, see `lorafit.data.batch.span_tokens`.
    """
    if plan.is_settled or step > len(plan.first_steps):
        return plan
    before = [*plan.measured.get(_MEASURED, []), *[None] * step][: step - 1]
    now = None if seconds is None else seconds / max(1, span_tokens)
    return replace(plan, measured={**plan.measured, _MEASURED: [*before, now]})


def forget_trials(plan: ResolvedPlan) -> ResolvedPlan:
    """The plan without what another run measured, so that its own steps are measured."""
    if plan.is_settled:
        return plan
    return replace(plan, measured={name: value for name, value in plan.measured.items() if name != _MEASURED})


def is_over(plan: ResolvedPlan, step: int) -> bool:
    """Whether all ways are tried after this step, and none is chosen yet."""
    return not plan.is_settled and step >= len(plan.first_steps)


def settle(plan: ResolvedPlan, cutter: Cutter, step_rows: StepRows) -> ResolvedPlan:
    """The plan with the way for all later steps: what would do the first steps' rows fastest.

    Of those close to it the one that holds the fewest tokens in memory is taken. Eager attention has to be more than
    10 % faster than any other.
    """
    times: dict[Way, list[float]] = {}
    for way, seconds in zip(plan.first_steps, plan.measured.get(_MEASURED, []), strict=False):
        if seconds is not None:
            times.setdefault(way, []).append(seconds)
    rates = {way: _rate(way, min(seconds), cutter, step_rows) for way, seconds in times.items()}
    shown = [{**asdict(way), "tokens_per_second": round(rate, 1)} for way, rate in rates.items()]
    measured = {**plan.measured, "tried": shown}
    return replace(plan.running(_choose(rates, plan)), measured=measured, is_settled=True)


def _choose(rates: Mapping[Way, float], plan: ResolvedPlan) -> Way:
    worth = {way: rate / (_EAGER_PAYS if way.attention == "eager" else 1.0) for way, rate in rates.items()}
    least = CLOSE_ENOUGH["cpu" if plan.device_kind == "cpu" else "gpu"] * max(worth.values(), default=0.0)
    close = [way for way, value in worth.items() if value >= least]
    return min(close, key=lambda way: (way.tokens_at_once, -worth[way]), default=plan.later)


def _rate(way: Way, seconds_a_token: float, cutter: Cutter, step_rows: StepRows) -> float:
    """Real tokens a second over the rows of the first steps: padding and idle cores are counted."""
    cutter = replace(cutter, attention=way.attention, at_once=way.micro_batches_at_once)
    steps = [step_rows.rows(step)[1] for step in range(1, _SAMPLED_STEPS + 1)]
    tokens = sum(int(cutter.examples.lengths[row]) for rows in steps for row in rows)
    span = sum(cutter.span_tokens(cutter.cut(rows, way.micro_batch_tokens)) for rows in steps)
    return tokens / (seconds_a_token * span)
