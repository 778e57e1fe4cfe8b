"""What held-out metrics decide while a run trains: the best checkpoint, and when to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lorafit.contracts import Reporter
from lorafit.kinds.metrics import metrics
from lorafit.trainer.state import TrainState


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
class HeldOut:
    """Evaluation while training, and what follows from it.

    Attributes:
        evaluate: Held-out metrics by name.
        select_metric: Decides which checkpoint is the best one, and about patience; None: neither.
        patience: Evaluations in a row without an improvement, after which the run ends; None: it does not.
        min_delta: A smaller improvement is none, in the metric's unit.
    """

    evaluate: Callable[[], dict[str, float]]
    select_metric: str | None = None
    patience: int | None = None
    min_delta: float = 0.0

    def judge(self, state: TrainState, values: Mapping[str, float], cadence: Cadence, reporter: Reporter) -> bool:
        """Takes an evaluation into account; returns whether it is the best so far."""
        name = self.select_metric
        if name is None:
            return False
        metric = metrics.get(name)
        value, lower_is_better = values[metric.name or name], metric.better == "lower"
        is_best = state.judge(value, name, lower_is_better=lower_is_better, min_delta=self.min_delta)
        if self.patience is not None and state.evaluations_without_improvement >= self.patience:
            state.stopped_early = True
            reporter.info(f"stopped early at step {state.step}: {self.patience} evaluations without a better {name}")
        if state.is_complete(cadence.total_steps):
            _warn_of_no_change(state, value, cadence.evaluate_every_steps, reporter)
        return is_best


def _warn_of_no_change(state: TrainState, value: float, first: int | None, reporter: Reporter) -> None:
    """That the metric which chooses the adapter ends where it began, and so chose the first that was evaluated."""
    best = state.best
    if best is not None and value == best.value and first == best.step < state.step:
        reporter.warn(
            f"{best.metric} is {value:.4g} at the last evaluation as at the first, and was never better: it chose "
            f"nothing, and the adapter is that of step {best.step}; take a metric that moves, e.g. loss"
        )
