"""A comparison on disk: what it compares, which of its runs are finished and what they gave, so that it can go on.

NAME-comparison/
  study.json          the definition, a record for each finished run, the rates that were chosen
  METHOD/lr-0.0002/seed-0/     a run folder for each run; its checkpoints go when it is finished
  scores/METHOD-seed-0.json    what the run of the chosen rate scored of each test row: made once
  comparison.json  report.md  quality.svg     the result
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median

from lorafit.contracts import JsonObject
from lorafit.errors import CheckpointError, UsageError
from lorafit.files.atomic import FORMAT, read_object, write_json
from lorafit.files.rundir import RunDir
from lorafit.recipe.differences import differences, tell_differences
from lorafit.run.output_folder import own_names
from lorafit.studies.variants import Variant

_STUDY = "study.json"


@dataclass(frozen=True)
class Run:
    """One run of a comparison."""

    variant: Variant
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder below the comparison's, and its key in study.json."""
        return f"{self.variant.folder}/lr-{self.rate:g}/seed-{self.seed}"

    @property
    def told(self) -> str:
        """For people."""
        return f"{self.variant.name}, learning rate {self.rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Record:
    """What a finished run gave.

    Attributes:
        selected_by: The metric whose best value on the validation rows counts; empty where none was looked at.
        value: That value; None where the run failed on its numbers, or nothing was looked at.
        failed: Why there is no adapter; empty where there is one.
        steps: Optimizer steps.
        seconds: Of the steps.
        wall_seconds: Of the whole run, loading and proofs among them.
        peak_memory_bytes: While training: allocated on a card, resident on a CPU.
        trainable_parameters: Of the adapter.
        adapter_bytes: Of its weights on disk.
        data: Digest of the prepared rows.
    """

    selected_by: str = ""
    value: float | None = None
    failed: str = ""
    steps: int = 0
    seconds: float = 0.0
    wall_seconds: float = 0.0
    peak_memory_bytes: int = 0
    trainable_parameters: int = 0
    adapter_bytes: int = 0
    data: str = ""


@dataclass
class Study:
    """The state of a comparison, written down after each thing that was done.

    Attributes:
        folder: The comparison's.
        definition: What makes it this comparison.
        runs: Records by run.
        broken: By variant, why it is left out; tried anew by a resume.
        left_out: By variant, that the budget does not reach it.
        chosen: By variant, the rate that the validation rows chose.
        searches_once: Whether rates are chosen on the first seed alone, as the budget wants.
    """

    folder: Path
    definition: JsonObject
    runs: dict[str, Record] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, float] = field(default_factory=dict)
    searches_once: bool = False

    @classmethod
    def open(cls, folder: Path, definition: JsonObject, *, resume: bool) -> Study:
        """The study of a folder, or a new one.

        Raises:
            UsageError: The folder holds a comparison and no resume is asked for, or something else.
            CheckpointError: It holds another comparison, or study.json cannot be read.
        """
        file = folder / _STUDY
        if not file.exists():
            if own_names(folder):
                what, todo = "the output is not empty, and holds no comparison", "choose a new or empty folder"
                raise UsageError(what, file=str(folder), key="output", todo=todo)
            return cls(folder, definition)
        if not resume:
            todo = "add --resume to go on with it, or give another --output"
            raise UsageError("holds a comparison already", file=str(folder), key="output", todo=todo)
        held = read_object(file)
        if changed := [text.removeprefix(".") for text in differences("", held.get("definition"), definition)]:
            old, new = (list((each or {}).get("variants", ())) for each in (held.get("definition"), definition))
            said = f"--over: it was {', '.join(old)} and is {', '.join(new)} now"
            named = [_as_asked(text, new) for text in changed]
            what = f"would not be the same comparison: {said if old != new else tell_differences(named)}"
            raise CheckpointError(what, file=str(folder), todo="change it back, or give another --output")
        try:
            runs = {name: Record(**record) for name, record in held["runs"].items()}
            names = ("left_out", "chosen", "searches_once")
            return cls(folder, definition, runs, **{name: held[name] for name in names})
        except (KeyError, TypeError, AttributeError) as error:
            what = f"cannot be read ({type(error).__name__})"
            raise CheckpointError(what, file=str(file), todo="give another --output") from error

    def save(self) -> None:
        """Writes study.json, whole or not at all."""
        held = asdict(self)
        del held["folder"], held["broken"]
        write_json(self.folder / _STUDY, {"format": FORMAT, **held})

    def where(self, run: Run) -> RunDir:
        """The folder of a run."""
        return RunDir(self.folder / run.name)

    def scores(self, run: Run) -> Path:
        """What the run scored of each test row."""
        return self.folder / "scores" / f"{run.variant.folder}-seed-{run.seed}.json"

    def keep(self, run: Run, record: Record) -> None:
        """Writes a finished run down. Its checkpoints are needed no more."""
        self.runs[run.name] = record
        self.save()
        shutil.rmtree(self.where(run).checkpoints, ignore_errors=True)

    def takes_part(self, variant: Variant) -> bool:
        """Whether a variant is compared, as far as is known."""
        return not variant.refused and variant.name not in self.broken and variant.name not in self.left_out


def _as_asked(text: str, variants: Sequence[str]) -> str:
    """A difference of two definitions by the flag, or the recipe's key, that it comes from."""
    key, mark, rest = text.partition(": ")
    for name in variants:
        if key.startswith(f"variants.{name}."):
            return f"{key.removeprefix(f'variants.{name}.')} of {name}{mark}{rest}"
        if key.startswith(f"rates.{name}"):
            return f"--learning-rates of {name}{mark}{rest}"
    return f"--{key.partition('[')[0]}{mark}{rest}"


def choose_rate(study: Study, runs: Sequence[Run], better: Callable[[str], str]) -> float | None:
    """The learning rate with the best mean on the validation rows, over the seeds that were run with every rate.

    Args:
        study: With the records.
        runs: All of one variant.
        better: Which direction of a metric is better.

    Returns:
        None where no rate has a usable run. A rate one of whose runs failed on its numbers is not chosen.
    """
    values: dict[float, list[float | None]] = {}
    selected_by = ""
    for run in runs:
        if (record := study.runs.get(run.name)) is not None:
            values.setdefault(run.rate, []).append(None if record.failed else record.value or 0.0)
            selected_by = record.selected_by or selected_by
    whole = {rate: sum(v for v in of if v is not None) / len(of) for rate, of in values.items() if None not in of}
    if not whole:
        return None
    sign = -1.0 if selected_by and better(selected_by) == "higher" else 1.0
    return min(whole, key=lambda rate: sign * whole[rate])


def plan_budget(seconds: Sequence[float], spent: float, budget: float, rates: int, seeds: int) -> tuple[bool, int]:
    """What a budget reaches: every rate with every seed, or rates on the first seed alone; and how many methods.

    Scoring the test rows of a run is taken to be as long as the run.

    Args:
        seconds: What the first run of each method took, in order.
        spent: Seconds spent so far, these runs among them.
        budget: Seconds, all in all.
        rates: Of each method.
        seeds: Of each method.

    Returns:
        Whether rates are searched on the first seed alone, and how many of the methods are compared, the first ones.
    """
    full, once = rates * seeds + seeds - 1, rates + 2 * seeds - 2

    def fits(count: int, runs: int) -> bool:
        return spent + runs * sum(seconds[:count]) <= budget

    if fits(len(seconds), full):
        return False, len(seconds)
    reached = [count for count in range(len(seconds) + 1) if fits(count, once)]
    return True, max(reached, default=0)


def seconds_left(done: Mapping[str, Record], runs: Sequence[Run]) -> float:
    """What so many more runs take, by those that are done; 0 where none is.

    Steps take what those of the method took so far, else of all. Besides, a run takes what the later runs of methods
    did, loading and proofs: a method's first has its memory measured, and the very first settles how steps are run.
    """
    steps: dict[str, list[float]] = {}
    first: list[float] = []
    later: list[float] = []
    for name, record in done.items():
        method = name.partition("/")[0]
        if not record.failed:
            (later if method in steps else first).append(record.wall_seconds - record.seconds)
            steps.setdefault(method, []).append(record.seconds)
    if not steps:
        return 0.0
    every, besides = [each for of in steps.values() for each in of], median(later) if later else min(first)
    return sum(mean(steps.get(run.variant.folder, every)) + besides for run in runs)
