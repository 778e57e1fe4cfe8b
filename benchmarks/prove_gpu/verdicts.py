"""What the stages found: figures with their bounds; and the table, the last line and the exit status they lead to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

STAGES = ("card", "kernels", "values", "resume", "memory", "waits", "speed")
NOT_ON_A_CPU = "speed"
HEADLINES = ("largest error of an estimate", "host waits a step", "tokens/s against the best", "8B at this rate")
"""Checks whose figures stand in the line PROVEN."""


@dataclass(frozen=True)
class Check:
    """One figure of a stage.

    Attributes:
        name: What was measured, in words.
        measured: The figure, for people.
        bound: What it is held against, for people; empty: nothing, it is only reported.
        held: Whether it kept to that; None where there is no bound.
    """

    name: str
    measured: str
    bound: str = ""
    held: bool | None = None

    @property
    def verdict(self) -> str:
        """A word for the table."""
        return {True: "held", False: "MISSED", None: "reported"}[self.held]


@dataclass(frozen=True)
class Lack:
    """What a stage could not do here.

    Attributes:
        text: What is missing, and what was done instead.
        is_whole: Whether the stage proves what it promises all the same.
    """

    text: str
    is_whole: bool = True


def worst(errors: Iterable[float]) -> float:
    """The largest in size; NaN where one is NaN, which `max` would pass over."""
    found = [abs(error) for error in errors]
    return math.nan if not found or any(map(math.isnan, found)) else max(found)


def at_most(name: str, value: float, bound: float, form: str = "{:.3g}") -> Check:
    """A figure that must not be larger; NaN misses."""
    return Check(name, form.format(value), f"<= {form.format(bound)}", bool(value <= bound))


def at_least(name: str, value: float, bound: float, form: str = "{:.3g}") -> Check:
    """A figure that must not be smaller; NaN misses."""
    return Check(name, form.format(value), f">= {form.format(bound)}", bool(value >= bound))


def is_so(name: str, holds: bool, measured: str, bound: str) -> Check:
    """A yes or no."""
    return Check(name, measured, bound, holds)


Stage = Callable[[], Iterator[Check | Lack]]


@dataclass
class Proof:
    """What ran, stage by stage.

    Attributes:
        where: The card and its software in words, e.g. `NVIDIA L4, driver 580.65, torch 2.13.0+cu130`.
        device_kind: `cuda` or `cpu`.
        versions: Of the libraries.
        checks: By stage, in order.
        lacks: Likewise.
        seconds: Of each stage that ended.
    """

    where: str
    device_kind: str
    versions: Mapping[str, str]
    checks: dict[str, list[Check]] = field(default_factory=dict)
    lacks: dict[str, list[Lack]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def missed(self) -> tuple[str, Check] | None:
        """Stage and check of the first bound that was missed."""
        return next(((s, check) for s, many in self.checks.items() for check in many if check.held is False), None)

    @property
    def left_out(self) -> list[str]:
        """Stages that did not run to their end, that judged nothing, or that lacked what they promise."""
        return [stage for stage in STAGES if not self._is_whole(stage)]

    @property
    def held(self) -> int:
        """How many bounds were kept."""
        return sum(check.held is True for many in self.checks.values() for check in many)

    @property
    def is_proven(self) -> bool:
        """On a card, by all stages, each of them whole."""
        return self.device_kind == "cuda" and self.missed is None and not self.left_out

    @property
    def exit_status(self) -> int:
        """1 where a bound was missed."""
        return 1 if self.missed else 0

    def _is_whole(self, stage: str) -> bool:
        judged = any(check.held is not None for check in self.checks.get(stage, ()))
        return stage in self.seconds and judged and all(lack.is_whole for lack in self.lacks.get(stage, ()))

    def line(self) -> str:
        """The last line. It begins with PROVEN only where a card passed every stage."""
        if self.missed is not None:
            stage, check = self.missed
            return f"MISSED on {self.where}: {stage}: {check.name} {check.measured}, bound {check.bound}"
        bounds, seconds = f"{self.held} of {self.held} bounds held", f"{sum(self.seconds.values()):.0f} s"
        missing = ", ".join(self.left_out)
        if self.is_proven:
            extra = [check for many in self.checks.values() for check in many if check.name in HEADLINES]
            figures = "".join(f"; {check.name} {check.measured}" for check in extra)
            return f"PROVEN on {self.where}: {bounds} in {seconds}{figures}"
        if self.device_kind == "cpu" and self.left_out == [NOT_ON_A_CPU]:
            return f"proven on a CPU (small mode, speed not run): {bounds} in {seconds}"
        kind = "a CPU (small mode)" if self.device_kind == "cpu" else self.where
        return f"not all proven on {kind}: {bounds} in {seconds}; not run, or not whole: {missing}"

    def to_json(self) -> dict[str, Any]:
        """Everything, for `benchmarks/gpu/` and the docs."""
        return {
            "where": self.where, "device_kind": self.device_kind, "versions": dict(self.versions),
            "proven": self.is_proven, "missed": self.missed[0] if self.missed else None, "left_out": self.left_out,
            "line": self.line(), "seconds": {stage: round(value, 1) for stage, value in self.seconds.items()},
            "stages": {
                stage: {
                    "checks": [asdict(check) for check in self.checks[stage]],
                    "lacks": [asdict(lack) for lack in self.lacks[stage]],
                }
                for stage in self.checks
            },
        }  # fmt: skip


def run_stages(
    proof: Proof,
    stages: Mapping[str, Stage],
    wanted: Sequence[str],
    clock: Callable[[], float],
    say: Callable[[str], None],
) -> None:
    """Runs the wanted stages in order, and ends at the first bound that is missed.

    What a stage raises is a bound missed too: it did not run to its end.
    """
    for name in wanted:
        checks, lacks = proof.checks.setdefault(name, []), proof.lacks.setdefault(name, [])
        began = clock()
        try:
            for found in stages[name]():
                if isinstance(found, Lack):
                    lacks.append(found)
                    say(f"{name}: {found.text}")
                    continue
                checks.append(found)
                say(f"{name}: {found.name}: {found.measured}, {found.verdict}")
                if found.held is False:
                    return
        except Exception as error:  # whatever it is: a proof that breaks is none
            text = str(error).strip().splitlines() or [""]
            checks.append(Check("ran to its end", f"{type(error).__name__}: {text[-1][:200]}", "no error", False))
            say(f"{name}: {type(error).__name__}: {error}")
            return
        proof.seconds[name] = clock() - began


def table(proof: Proof) -> Table:
    """All stages, those that did not run among them."""
    shown = Table(title=proof.where, title_justify="left", title_style="")
    for column in ("stage", "what", "measured", "bound", "verdict"):
        shown.add_column(column, overflow="fold", no_wrap=column in ("stage", "verdict"))
    for stage in STAGES:
        rows = [(check.name, check.measured, check.bound, check.verdict) for check in proof.checks.get(stage, ())]
        rows += [(lack.text, "", "", "note" if lack.is_whole else "left out") for lack in proof.lacks.get(stage, ())]
        for number, row in enumerate(rows or [("", "", "", "not run")]):
            style = {"MISSED": "bold red", "held": "green"}.get(row[-1], "dim")
            cells = [Text(stage if number == 0 else ""), *map(Text, row[:-1]), Text(row[-1], style=style)]
            shown.add_row(*cells, end_section=number == max(1, len(rows)) - 1)
    return shown
