"""What held-out metrics decide while a run trains: the best checkpoint, when the rate falls, and when to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lorafit.console.wording import counted
from lorafit.contracts import Reporter
from lorafit.kinds.metrics import metrics
from lorafit.trainer.state import Plateau, TrainState


@dataclass(frozen=True)
class Cadence:
    """When a run evaluates, saves and ends, in optimizer steps.

    Attributes:
        total_steps: Of the whole run.
        save_every_steps: A checkpoint each time, and one at the end.
        evaluate_every_steps: An evaluation each time, and one at the end; None: none.
    """

    total_steps: int
    save_every_steps: int
    evaluate_every_steps: int | None = None


@dataclass(frozen=True)
class OnPlateau:
    """What follows where the metric no longer improves: a lower learning rate, from the best weights if so asked.

    The metric is compared as torch's ReduceLROnPlateau does, with an absolute threshold; no more than `at_most` times
    does anything follow, and every step of the run is taken once.

    Attributes:
        patience: Evaluations without an improvement by more than `min_delta`.
        factor: Multiplier of the learning rate, each time.
        at_most: How often.
        go_back: Whether weights and optimizer of the best checkpoint are taken, too.
    """

    patience: int
    min_delta: float = 0.0
    factor: float = 0.5
    at_most: int = 3
    go_back: bool = False

    def follow(self, state: TrainState, value: float, sign: float) -> bool:
        """Takes an evaluation into account; returns whether the learning rate falls. `sign`: 1.0: higher is better."""
        now = state.plateau
        if now.value is None or sign * (value - now.value) > self.min_delta:
            state.plateau = Plateau(now.factor, value, 0, now.times)
            return False
        falls = now.evaluations + 1 >= self.patience and now.times < self.at_most
        if falls:
            state.plateau = Plateau(now.factor * self.factor, now.value, 0, now.times + 1)
        else:
            state.plateau = Plateau(now.factor, now.value, now.evaluations + 1, now.times)
        return falls


class Verdict(NamedTuple):
    """What an evaluation leads to.

    Attributes:
        is_best: It is the best so far.
        rate_falls: The learning rate's factor fell.
        goes_back: The run is to go on from the best checkpoint.
    """

    is_best: bool = False
    rate_falls: bool = False
    goes_back: bool = False


@dataclass(frozen=True)
class HeldOut:
    """Evaluation while training, and what follows from it.

    Attributes:
        evaluate: Held-out metrics by name.
        select_metric: Decides which checkpoint is the best one, and about patience; None: neither.
        patience: Evaluations in a row without an improvement, after which the run ends; None: it does not.
        min_delta: A smaller improvement is none, in the metric's unit.
        on_plateau: What follows before that; None: nothing.
    """

    evaluate: Callable[[], dict[str, float]]
    select_metric: str | None = None
    patience: int | None = None
    min_delta: float = 0.0
    on_plateau: OnPlateau | None = None

    def judge(self, state: TrainState, values: Mapping[str, float], cadence: Cadence, reporter: Reporter) -> Verdict:
        """Takes an evaluation into account, and says what it leads to."""
        name = self.select_metric
        if name is None:
            return Verdict()
        metric = metrics.get(name)
        value, lower_is_better = values[metric.name or name], metric.better == "lower"
        is_best = state.judge(value, name, lower_is_better=lower_is_better, min_delta=self.min_delta)
        if self.patience is not None and state.evaluations_without_improvement >= self.patience:
            state.stopped_early = True
            reporter.info(f"stopped early at step {state.step}: {_without(self.patience, name, self.min_delta)}")
        is_complete, plateau = state.is_complete(cadence.total_steps), self.on_plateau
        if is_complete:
            _warn_of_no_change(state, value, cadence.evaluate_every_steps, reporter)
        sign = -1.0 if lower_is_better else 1.0
        if plateau is None or is_complete or not plateau.follow(state, value, sign):
            return Verdict(is_best)
        says = f"step {state.step}: {_without(plateau.patience, name, plateau.min_delta)}"
        reporter.info(f"{says}: the learning rate falls to {state.plateau.factor:g} of its schedule's")
        state.events.append({"kind": "plateau", "step": state.step, "factor": f"{state.plateau.factor:g}"})
        return Verdict(is_best, rate_falls=True, goes_back=plateau.go_back and not is_best)


def _without(evaluations: int, name: str, min_delta: float) -> str:
    better = f"{name} better by more than {min_delta:g}" if min_delta else f"better {name}"
    return f"{counted(evaluations, 'evaluation')} without a {better}"


def _warn_of_no_change(state: TrainState, value: float, first: int | None, reporter: Reporter) -> None:
    """That the metric which chooses the adapter ends where it began, and so chose the first that was evaluated."""
    best = state.best
    if best is not None and value == best.value and first == best.step < state.step:
        reporter.warn(
            f"{best.metric} is {value:.4g} at the last evaluation as at the first, and was never better: it chose "
            f"nothing, and the adapter is that of step {best.step}; take a metric that moves, e.g. loss"
        )
