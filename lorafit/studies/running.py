"""The runs of a comparison, one after the other. Read `Comparison.run` first.

    first run of each variant ─> what the budget reaches ─> every learning rate, every seed ─> rates chosen on the
    validation rows ─> test rows, once, by the runs of the chosen rates ─> standings, table, plot

All variants see the same rows in the same order, by their seeds, have as many learning rates, and are run as one plan
says. A variant that cannot be run, or fails, is a line with the reason.
"""

from __future__ import annotations

import gc
import math
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit import pipeline
from lorafit.console.exits import bug, explain
from lorafit.console.reporting import clock
from lorafit.console.wording import counted
from lorafit.contracts import Progress, Reporter
from lorafit.errors import LorafitError, NumericsError, StoppedBySignal, UsageError
from lorafit.files.atomic import read_object, write_json
from lorafit.files.rundir import RunDir
from lorafit.kinds.metrics import metrics
from lorafit.run.workspace import is_run
from lorafit.studies.compared import Compared, put_together
from lorafit.studies.scores import keep_scores
from lorafit.studies.study import Record, Run, Study, choose_rate, plan_budget, seconds_left
from lorafit.studies.variants import Variant

if TYPE_CHECKING:
    from lorafit.evaluation.runner import Side

_AT_THE_END = 1_000_000
"""`evaluation.every_steps` of a run that its recipe evaluates nowhere: the end of a run is always evaluated."""
_TAKES_A_WHILE = ("loading ", "rehearsing", "converting ", "choosing ")
"""What messages begin with that say what a run does before its steps."""


class _OfARun:
    """What is told of a run among many: warnings, what it does before its steps, bars; and not its plan and tables.

    Args:
        reporter: Told.
        later_seconds: What the runs behind this one take, by those that are done; 0 where none is.
        hides: What a warning begins with that is of no use: of a value that the comparison has set.
    """

    def __init__(self, reporter: Reporter, later_seconds: float = 0.0, hides: str = "evaluation.every_steps ") -> None:
        self._reporter, self._later, self._hides = reporter, later_seconds, hides

    def info(self, message: str) -> None:
        """Passes on what takes a while, and drops the rest."""
        if message.startswith(_TAKES_A_WHILE):
            self._reporter.info(f"  {message}")

    def show(self, renderable: object) -> None:
        """Drops it."""

    def warn(self, message: str) -> None:
        """Passes it on."""
        if not message.startswith(self._hides):
            self._reporter.warn(message)

    def track(self, total: int | None, what: str, done: int = 0) -> Progress:
        """A bar; that of the steps says what the runs behind this one take."""
        bar = self._reporter.track(total, what, done)
        return _Step(bar, clock(self._later)) if what == "training" and self._later else bar


class _Step:
    """The bar of a run's steps, with the time that is left behind them."""

    def __init__(self, bar: Progress, later: str) -> None:
        self._bar, self._later = bar, later

    def __enter__(self) -> Progress:
        self._bar.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.__exit__(*exc)

    def advance(self, amount: int = 1, **shown: Any) -> None:
        """Some steps."""
        self._bar.advance(amount, **shown, later_runs=self._later)


@dataclass
class Comparison:
    """One call of `lorafit compare`.

    Attributes:
        variants: All, refused ones among them.
        rates: Learning rates by variant.
        seeds: Of the runs.
        metric: What variants are ranked by.
        study: Its state on disk.
        reporter: Told of each run.
        budget_seconds: None: no bound.
    """

    variants: list[Variant]
    rates: dict[str, list[float]]
    seeds: list[int]
    metric: str
    study: Study
    reporter: Reporter
    budget_seconds: float | None
    _base_sides: dict[str, Side] = field(default_factory=dict, init=False)

    def run(self) -> Compared:
        """Trains, chooses, scores and puts together; what is done already is not done again.

        Raises:
            StoppedBySignal: A signal came; what is finished is written down.
            UsageError: The budget reaches too little, rows were changed, or no method could be run.
        """
        try:
            return self._run()
        except (KeyboardInterrupt, StoppedBySignal) as stop:
            known = stop if isinstance(stop, StoppedBySignal) else None
            number = known.exit_code - 128 if known is not None else signal.SIGINT
            what = known.what if known is not None else "stopped by SIGINT; what is finished is kept"
            todo = "go on with the same command and --resume"
            raise StoppedBySignal(what, signal_number=number, todo=todo) from None

    def _run(self) -> Compared:
        study = self.study
        self._say_what_will_be()
        study.save()
        for variant in self._live():
            self._train_all([self._first_run(variant)])
        if self.budget_seconds is not None:
            self._plan_for_budget(self.budget_seconds)
        searched = self.seeds[:1] if study.searches_once else self.seeds
        self._train_all([run for variant in self._live() for run in self._runs(variant, searched)])
        chosen = {variant.name: self._choose(variant, searched) for variant in self._live()}
        rest = [
            Run(variant, rate, seed)
            for variant in self._live()
            if (rate := chosen[variant.name]) is not None
            for seed in self.seeds
        ]
        self._train_all(rest)
        if not self._live():
            self._raise_what_all_failed_of()
        for variant in self._live():
            study.chosen.setdefault(variant.name, chosen[variant.name] or 0.0)
        study.save()  # the choice is written down before a test row is read
        self._forget_other_adapters()
        for variant in self._live():
            self._score([Run(variant, study.chosen[variant.name], seed) for seed in self.seeds])
        if not self._live():
            self._raise_what_all_failed_of()
        result = put_together(study, self.variants, self.rates, self.seeds, self.metric)
        result.write()
        return result

    def _live(self) -> list[Variant]:
        return [variant for variant in self.variants if self.study.takes_part(variant)]

    def _runs(self, variant: Variant, seeds: Sequence[int]) -> list[Run]:
        """All runs that choose a variant's rate; none where it is chosen."""
        if variant.name in self.study.chosen:
            return []
        return [Run(variant, rate, seed) for seed in seeds for rate in self.rates[variant.name]]

    def _first_run(self, variant: Variant) -> Run:
        rates = self.rates[variant.name]
        rate = self.study.chosen.get(variant.name, rates[len(rates) // 2])
        return Run(variant, rate, self.seeds[0])

    def _say_what_will_be(self) -> None:
        for variant in self.variants:
            if variant.refused:
                self.reporter.warn(f"{variant.name} is left out: {variant.refused}")
            for note in variant.notes:
                self.reporter.info(note)
        rates, runs = max(map(len, self.rates.values())), self._all_runs()
        done = len(self.study.runs)
        self.reporter.info(
            f"{counted(len(self.rates), 'method')}, {counted(rates, 'learning rate')} and "
            f"{counted(len(self.seeds), 'seed')} each: {counted(runs, 'run')}{f', {done} of them done' if done else ''}"
        )

    def _all_runs(self) -> int:
        """How many runs there are, as far as is known."""
        found, others = 0, len(self.seeds) - 1
        for variant in self._live():
            rates = len(self.rates[variant.name])
            found += rates + others * (1 if self.study.searches_once else rates)
        return found

    def _plan_for_budget(self, budget: float) -> None:
        """Says what the budget reaches, by what the first run of each method took, and leaves the rest out.

        Raises:
            UsageError: It does not reach two methods.
        """
        study = self.study
        live = [variant for variant in self.variants if not variant.refused and variant.name not in study.broken]
        seconds = [self.study.runs[self._first_run(variant).name].wall_seconds for variant in live]
        spent = sum(record.wall_seconds for record in study.runs.values())
        if spent > sum(seconds):  # of a resume: what was spent behind the first runs is not to be done again
            spent = sum(seconds)
        rates = max(map(len, self.rates.values()))
        study.searches_once, reached = plan_budget(seconds, spent, budget, rates, len(self.seeds))
        if reached < min(2, len(live)):
            _, least = plan_budget(seconds[:2], spent, float("inf"), rates, len(self.seeds))
            need = spent + (rates + 2 * len(self.seeds) - 2) * sum(seconds[:least])
            what = f"two methods alone take about {clock(need)}"
            enough = f"--resume --budget {math.ceil(need / 60)}min"
            todo = f"go on with {enough}, or shorten the recipe's runs and give another --output"
            raise UsageError(what, key="--budget", todo=todo)
        why = f"the budget of {clock(budget)} does not reach it"
        study.left_out = {variant.name: why for variant in live[reached:]}
        study.save()
        if study.searches_once and rates > 1:
            self.reporter.warn(
                f"budget: every method's {counted(rates, 'learning rate')} are tried with the first seed alone; the "
                f"other {counted(len(self.seeds) - 1, 'seed')} take the chosen one"
            )
        for name, why in study.left_out.items():
            self.reporter.warn(f"{name} is left out: {why}")

    def _train_all(self, runs: Sequence[Run]) -> None:
        """Trains what is not finished yet; a variant that fails takes no further part."""
        by_seed = sorted(
            runs, key=lambda run: (self.seeds.index(run.seed), self.rates[run.variant.name].index(run.rate))
        )
        waiting = [run for run in by_seed if run.name not in self.study.runs]
        for number, run in enumerate(waiting):
            if not self.study.takes_part(run.variant) or run.name in self.study.runs:
                continue
            left = seconds_left(self.study.runs, waiting[number:])
            self.reporter.info(
                f"run {len(self.study.runs) + 1} of {max(self._all_runs(), len(self.study.runs) + 1)}: {run.told}"
                + (f"; about {clock(left)} of training left" if left else "")
            )
            self._train(run, seconds_left(self.study.runs, waiting[number + 1 :]))

    def _train(self, run: Run, later_seconds: float) -> None:
        """One run, and its record; numbers that are none are a record too, any other error ends the variant."""
        study, variant, where = self.study, run.variant, self.study.where(run)
        assert variant.loaded is not None
        evaluation = variant.loaded.recipe.evaluation
        flags = [*variant.overrides, f"training.learning_rate={run.rate!r}", f"seed={run.seed}"]
        if evaluation.every_steps is None and variant.loaded.recipe.data.validation is not None:
            flags.append(f"evaluation.every_steps={_AT_THE_END}")
        gc.collect()  # the model of the run before would count as memory of this one
        plan, began = self._plan_file(variant), time.perf_counter()
        try:
            trained = pipeline.train(
                variant.recipe,
                overrides=flags,
                output=where.root,
                resume=is_run(where.root),
                plan_file=plan if plan.exists() else None,
                reporter=_OfARun(self.reporter, later_seconds),
            )
        except StoppedBySignal:
            raise
        except NumericsError as error:
            self.reporter.warn(f"{run.told}: {error.what}")
            study.keep(run, Record(failed=error.what, wall_seconds=time.perf_counter() - began))
            return
        except Exception as error:
            self._break(variant, error)
            return
        record = _read_record(where, trained.plan.trainable_parameters, time.perf_counter() - began)
        self._check_data(run, record)
        if not plan.exists():
            write_json(plan, read_object(where.plan))
        study.keep(run, record)

    def _plan_file(self, variant: Variant) -> Path:
        """The values that all runs over the same model take, once the first of them has settled them."""
        same = next(each for each in self.variants if each.values().get("model") == variant.values()["model"])
        return self.study.folder / "plans" / f"{same.folder}.json"

    def _break(self, variant: Variant, error: Exception) -> None:
        """Leaves a variant out, and says why."""
        known = error if isinstance(error, LorafitError) else explain(error, "train") or bug(error)
        why = known.errors[0].one_line
        self.study.broken[variant.name] = why
        self.reporter.warn(f"{variant.name} is left out: {why}")

    def _check_data(self, run: Run, record: Record) -> None:
        """Raises UsageError where a run of a seed was trained on other rows than those before it."""
        values = run.variant.values()
        for name, known in self.study.runs.items():
            folder, _, seed = name.partition("/")[0], *name.rpartition("/")[1:]
            other = next((each for each in self.variants if each.folder == folder and not each.refused), None)
            if other is None or seed != f"seed-{run.seed}" or not known.data:
                continue
            alike = all(other.values()[key] == values[key] for key in ("model", "data", "task"))
            if alike and known.data != record.data:
                what = f"its rows are not those of {name}: a file of them was changed since"
                raise UsageError(what, file=run.name, todo="restore the file, or give another --output")

    def _choose(self, variant: Variant, seeds: Sequence[int]) -> float | None:
        """The rate of a variant; one without a usable run is left out."""
        if (known := self.study.chosen.get(variant.name)) is not None:
            return known
        runs = self._runs(variant, seeds)
        rate = choose_rate(self.study, runs, lambda name: metrics.get(name).better)
        if rate is None:
            failed = next(record.failed for run in runs if (record := self.study.runs[run.name]).failed)
            self.study.broken[variant.name] = f"it fails with every learning rate: {failed}"
        return rate

    def _forget_other_adapters(self) -> None:
        """Removes the adapters of rates that were not chosen: nothing reads them any more."""
        for variant in self._live():
            for seed in self.seeds:
                for rate in self.rates[variant.name]:
                    if rate != self.study.chosen[variant.name]:
                        where = self.study.where(Run(variant, rate, seed))
                        shutil.rmtree(where.adapter, ignore_errors=True)
                        shutil.rmtree(where.first_adapter, ignore_errors=True)

    def _score(self, runs: Sequence[Run]) -> None:
        """Scores the test rows by each run of a variant that has not done it yet."""
        for run in runs:
            if self.study.scores(run).exists():
                continue
            self.reporter.info(f"test rows: {run.told}")
            try:
                found = pipeline.evaluate(
                    self.study.where(run).root,
                    split="test",
                    base_sides=self._base_sides,
                    reporter=_OfARun(self.reporter),
                )
            except StoppedBySignal:
                raise
            except Exception as error:
                self._break(run.variant, error)
                return
            keep_scores(self.study.scores(run), found.evaluation.rows, [self.metric, *found.evaluation.signatures])

    def _raise_what_all_failed_of(self) -> None:
        names = ", ".join(self.study.broken)
        why = next(iter(self.study.broken.values()), "nothing is left")
        raise UsageError(f"no method could be run ({names}): {why}", todo="mend the recipe, and run it again")


def _read_record(where: RunDir, trainable_parameters: int, wall_seconds: float) -> Record:
    """A finished run's record, from what it wrote."""
    result = read_object(where.result)
    best = result["best"] or {}
    return Record(
        selected_by=best.get("metric", ""),
        value=best.get("value"),
        steps=result["steps"],
        seconds=result["seconds"],
        wall_seconds=wall_seconds,
        peak_memory_bytes=result["peak_memory_bytes"],
        trainable_parameters=trainable_parameters,
        adapter_bytes=sum(file.stat().st_size for file in where.adapter.glob("*.safetensors")),
        data=str(read_object(where.manifest).get("data", "")),
    )
