"""What a comparison found: a line for each method and what can be told apart, as table, JSON, Markdown and plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np

from lorafit.console.reporting import Printed, say, show_table
from lorafit.console.wording import counted, near
from lorafit.contracts import JsonObject
from lorafit.files.atomic import FORMAT, atomic_file, write_json
from lorafit.kinds.metrics import metrics
from lorafit.studies.plot import Point, draw_quality
from lorafit.studies.scores import read_scores, scored_metrics
from lorafit.studies.standings import RESAMPLES, Standing, groups, stand
from lorafit.studies.study import Run, Study
from lorafit.studies.variants import Variant

if TYPE_CHECKING:
    from rich.console import Console

_MEBIBYTE = 1 << 20
BASE = "base"
_QUALITY = ("method", "value", "to the best", "95 %", "verdict")
_COST = ("method", "rate", "parameters", "memory", "time", "size")


@dataclass(frozen=True)
class Line:
    """One method of a finished comparison.

    Attributes:
        method: Its name; `base` for the base model, which nothing was trained of.
        left_out: Why it was not compared; empty where it was.
        notes: Options of the recipe that it has not.
        rates: Learning rates that were tried.
        rate: The one that the validation rows chose.
        validation: By rate the mean value on the validation rows; null where a run failed on its numbers.
        trainable_parameters: Of the adapter.
        peak_memory_bytes: The mean over seeds, while training.
        seconds: Of the steps, the mean over seeds.
        adapter_bytes: On disk.
    """

    method: str
    left_out: str = ""
    notes: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    rate: float | None = None
    validation: dict[str, float | None] = field(default_factory=dict)
    trainable_parameters: int = 0
    peak_memory_bytes: int = 0
    seconds: float = 0.0
    adapter_bytes: int = 0

    @property
    def edge(self) -> str:
        """`lowest` or `highest` where the chosen rate is one of several and at an end of them; else empty."""
        if self.rate is None or len(self.rates) < 2:
            return ""
        return {self.rates[0]: "lowest", self.rates[-1]: "highest"}.get(self.rate, "")


@dataclass(frozen=True)
class Compared(Printed):
    """A finished comparison.

    Attributes:
        folder: Where it lies.
        metric: What the methods are ranked by.
        seeds: Of the runs.
        rows: Test rows that this metric scored.
        lines: Methods in the order of the command, then the base.
        standings: By metric value, of each compared method and of the base.
        searches_once: Whether rates were chosen on the first seed alone, as the budget wanted.
    """

    folder: Path
    metric: str
    seeds: tuple[int, ...]
    rows: int
    lines: tuple[Line, ...]
    standings: dict[str, list[Standing]]
    searches_once: bool

    @property
    def ranked(self) -> list[Standing]:
        """Standings in what the methods are ranked by, best first, the base last."""
        found = self.standings[self.headline]
        sign = 1.0 if metrics.get(self.metric).better == "lower" else -1.0
        return sorted(found, key=lambda each: (each.method == BASE, sign * each.value))

    @property
    def headline(self) -> str:
        """Name of the value that the methods are ranked by."""
        return metrics.get(self.metric).name or self.metric

    @property
    def sentences(self) -> list[str]:
        """What follows, for people."""
        same, worse = groups(self.ranked)
        told = f"on {self.headline}, {counted(self.rows, 'test row')} and {counted(len(self.seeds), 'seed')}"
        found = [f"best {told}: {same[0]}"]
        if len(same) > 1:
            found.append(f"not distinguishable from it: {', '.join(same[1:])}")
            halves = [each.difference_high - each.difference for each in self.ranked if each.method in same[1:]]
            found.append(f"a difference below about {max(halves):.2g} could not have been told with these runs")
        if worse:
            found.append(f"worse: {', '.join(worse)}")
        if (base := self._standing(BASE)) is not None:
            found.append(f"the base model without training is {base.verdict}")
        for line in self.lines:
            if line.edge:
                way = "lower" if line.edge == "lowest" else "higher"
                found.append(
                    f"{line.method}: the {line.edge} learning rate was the best, so that a {way} one may be better"
                )
        if self.searches_once:
            found.append("learning rates were chosen on the first seed alone, as the budget wanted")
        return [*found, *(f"{line.method} is left out: {line.left_out}" for line in self.lines if line.left_out)]

    def _standing(self, method: str, value: str | None = None) -> Standing | None:
        return next((each for each in self.standings[value or self.headline] if each.method == method), None)

    def to_json(self) -> JsonObject:
        """All of it."""
        same, worse = groups(self.ranked)
        lines = []
        for line in self.lines:
            of_method = {name: self._standing(line.method, name) for name in self.standings}
            held = {name: found.to_json() for name, found in of_method.items() if found is not None}
            lines.append({**asdict(line), "edge": line.edge, "metrics": held})
        return {
            "format": FORMAT,
            "metric": self.metric,
            "seeds": list(self.seeds),
            "rows": self.rows,
            "best": same[0],
            "not_distinguishable": same,
            "worse": worse,
            "rates_by_first_seed": self.searches_once,
            "sentences": self.sentences,
            "methods": lines,
        }

    def write(self) -> None:
        """Writes comparison.json, report.md and quality.svg, each whole or not at all."""
        points = []
        for line in self.lines:
            if (each := self._standing(line.method)) is not None:
                is_same = each.verdict in ("best", "not distinguishable")
                sizes = (line.trainable_parameters, line.peak_memory_bytes / _MEBIBYTE)
                interval = each.difference, each.difference_low, each.difference_high
                points.append(Point(line.method, *interval, *sizes, is_same))
        plot = draw_quality(self.headline, self.ranked[0].method, points)
        for name, text in (("report.md", self._markdown()), ("quality.svg", plot)):
            with atomic_file(self.folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        write_json(self.folder / "comparison.json", self.to_json())

    def render(self, console: Console) -> None:
        """The table, what follows, and where the rest is."""
        cells = self._table()
        for columns in (_QUALITY, _COST):
            headings = [self.headline if heading == "value" else heading for heading in columns]
            words = [number for number, heading in enumerate(columns) if heading in ("method", "verdict")]
            lines = [[each[heading] for heading in columns] for each in cells]
            show_table(console, headings, lines, words=words)
            console.print()
        for sentence in self.sentences:
            say(console, sentence)
        say(console, f"report: {near(self.folder / 'report.md')}, plot: {near(self.folder / 'quality.svg')}")

    def _table(self) -> list[dict[str, str]]:
        """Cells by heading, best first, what was left out last."""
        lines = {line.method: line for line in self.lines}
        found = []
        for each in self.ranked:
            line = lines[each.method]
            rate = "-" if line.rate is None else f"{line.rate:g}{f' ({line.edge})' if line.edge else ''}"
            cells = {
                "method": each.method,
                "value": f"{each.value:.4g}",
                "value 95 %": f"{each.low:.4g} to {each.high:.4g}",
                "to the best": f"{each.difference:+.2g}",
                "95 %": f"{each.difference_low:+.2g} to {each.difference_high:+.2g}",
                "verdict": each.verdict,
                "rate": rate,
                "parameters": f"{line.trainable_parameters:,}",
                "memory": f"{line.peak_memory_bytes / _MEBIBYTE:,.0f} MiB",
                "time": f"{line.seconds:.1f} s",
                "size": f"{line.adapter_bytes / _MEBIBYTE:.2f} MiB",
            }
            empty: tuple[str, ...] = ("memory", "time", "size") if each.method == BASE else ()
            empty += ("to the best", "95 %") if each.verdict == "best" else ()
            found.append({heading: "-" if heading in empty else cell for heading, cell in cells.items()})
        none = dict.fromkeys(found[0], "-")
        left_out = [{**none, "method": line.method, "verdict": "left out"} for line in self.lines if line.left_out]
        return [*found, *left_out]

    def _markdown(self) -> str:
        others = [name for name in self.standings if name != self.headline]
        headings = [*_QUALITY[:2], "value 95 %", *_QUALITY[2:], *others, *_COST[1:]]
        shown = [heading.replace("value", self.headline) for heading in headings]
        lines = ["# Comparison", "", *(f"- {sentence}" for sentence in self.sentences), ""]
        lines += [_row(shown), _row(["---", *["---:"] * (len(headings) - 1)])]
        for cells in self._table():
            for name in others:
                each = self._standing(cells["method"], name)
                cells[name] = "-" if each is None else f"{each.value:.4g} ({each.low:.4g} to {each.high:.4g})"
            lines.append(_row([cells[heading] for heading in headings]))
        lines += ["", "![quality against parameters and memory](quality.svg)", "", "## Learning rates", ""]
        lines += [_row(["method", "tried", "mean on the validation rows", "chosen"]), _row(["---"] * 4)]
        for line in self.lines:
            if line.rates and not line.left_out:
                values = ", ".join("failed" if v is None else f"{v:.4g}" for v in line.validation.values())
                lines.append(_row([line.method, ", ".join(f"{r:g}" for r in line.rates), values, f"{line.rate:g}"]))
        notes = [note for line in self.lines for note in line.notes]
        lines += ["", "## How it was compared", "", *(f"- {note}" for note in notes)]
        lines += [
            f"- seeds {', '.join(map(str, self.seeds))}; every method saw the same rows in the same order, by its seed",
            "- the learning rate of each method was chosen on the validation rows",
            "- the test rows were scored once, by the runs of the chosen rates",
            f"- intervals are over seeds and rows ({RESAMPLES:,} draws of rows)",
            "- those of differences to the best hold for all pairs of methods at once",
        ]
        return "\n".join(lines) + "\n"


def put_together(
    study: Study, variants: Sequence[Variant], rates: dict[str, list[float]], seeds: Sequence[int], metric: str
) -> Compared:
    """The result of a study all of whose runs are finished and scored."""
    live = [variant for variant in variants if study.takes_part(variant)]
    runs = {v.name: [Run(v, study.chosen[v.name], seed) for seed in seeds] for v in live}
    files = {name: [study.scores(run) for run in of_method] for name, of_method in runs.items()}
    every = [file for of_method in files.values() for file in of_method]
    standings: dict[str, list[Standing]] = {}
    rows = 0
    for name in scored_metrics(every):
        tuned, base = read_scores(every, name, "tuned"), read_scores(every, name, "base")
        if not len(tuned[0]):
            continue
        sums = {v.name: np.stack(tuned[n * len(seeds) : (n + 1) * len(seeds)]) for n, v in enumerate(live)}
        standings |= stand(metrics.get(name), sums, base[0], seed=seeds[0])
        rows = len(tuned[0]) if name == metric else rows
    lines = [_line(study, variant, rates, runs.get(variant.name, [])) for variant in variants]
    return Compared(study.folder, metric, tuple(seeds), rows, (*lines, Line(BASE)), standings, study.searches_once)


def _line(study: Study, variant: Variant, rates: dict[str, list[float]], runs: Sequence[Run]) -> Line:
    why = variant.refused or study.left_out.get(variant.name) or study.broken.get(variant.name, "")
    if why:
        return Line(variant.name, why, variant.notes, tuple(rates.get(variant.name, ())))
    records = [study.runs[run.name] for run in runs]
    validation: dict[str, float | None] = {}
    for rate in rates[variant.name]:
        tried = [study.runs.get(Run(variant, rate, run.seed).name) for run in runs]
        values = [None if each.failed else each.value for each in tried if each is not None]
        known = [value for value in values if value is not None]
        validation[f"{rate:g}"] = mean(known) if known and len(known) == len(values) else None
    return Line(
        method=variant.name,
        notes=variant.notes,
        rates=tuple(rates[variant.name]),
        rate=runs[0].rate,
        validation=validation,
        trainable_parameters=records[0].trainable_parameters,
        peak_memory_bytes=round(mean(record.peak_memory_bytes for record in records)),
        seconds=mean(record.seconds for record in records),
        adapter_bytes=records[0].adapter_bytes,
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
