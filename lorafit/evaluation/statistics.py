"""Is the tuned model better than the base, or is that luck of the rows? A paired bootstrap, and a plain sentence.

    rows     base sums [rows, k]      tuned sums [rows, k]
    draw     rows with replacement, the same rows for both          10,000 times
    each     values(sums of the drawn rows) of tuned, and of tuned minus base
    interval 2.5 % and 97.5 % quantile of either

The same drawn rows for both models is what makes it paired: rows that are hard for both cancel out.

A share of rows (accuracy, must_contain) has Wilson's and Newcombe's intervals instead: where all rows are right, every
draw is the same, and a bootstrap would be sure of what six rows say.

Source: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", chapter 13 (percentile interval); Koehn (2004),
"Statistical Significance Tests for Machine Translation Evaluation", section 4 (paired bootstrap over corpus scores).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from lorafit.console.wording import agreed, counted
from lorafit.contracts import JsonObject
from lorafit.evaluation.share_intervals import is_share, share_difference_interval, share_interval
from lorafit.kinds.metrics import Metric, RowScore

Floats = npt.NDArray[np.float64]
Judged = Literal["better", "worse", "not distinguishable", "too few rows"]
Verdict = Literal[Judged, "not judged"]

RESAMPLES = 10_000
CONFIDENCE = 0.95
LEAST_ROWS = 6
"""Fewest rows for a verdict. Where all n move one way, a two-sided sign test gives p = 2 ** (1 - n): 0.06 for 5."""
ROUGH_ROWS = 30
"""Below this many rows the sentence says that the interval is rough: percentile intervals are too narrow then."""
_NOISE = 1e-12  # what rounding leaves of a 0
_CHUNK_CELLS = 1 << 22  # counts held at a time: 32 MiB


@dataclass(frozen=True, slots=True)
class Comparison:
    """Base and tuned model on one value of one metric, on the same rows.

    Attributes:
        metric: The metric's name in the recipe.
        name: Name of the value, e.g. `rougeL` of `rouge`.
        better: Which direction is better.
        percent: Whether the values are shares of 1, shown in per cent.
        base: The base model's value.
        tuned: The tuned model's value.
        tuned_low: Lower end of the 95 % interval of the tuned model's value itself.
        tuned_high: Upper end.
        difference: tuned - base.
        low: Lower end of the 95 % interval of the difference.
        high: Upper end.
        rows: Rows that were scored.
        rows_better: Rows on which the tuned model scored better.
        rows_worse: Rows on which it scored worse; the others are equal.
        verdict: What the interval says; `not judged` of a value without one (`Metric.whole`), whose ends are the value
            itself.
    """

    metric: str
    name: str
    better: Literal["lower", "higher"]
    percent: bool
    base: float
    tuned: float
    tuned_low: float
    tuned_high: float
    difference: float
    low: float
    high: float
    rows: int
    rows_better: int
    rows_worse: int
    verdict: Verdict

    @property
    def sentence(self) -> str:
        """The verdict with its numbers, for people."""
        rows = counted(self.rows, "row")
        change = f"from {self.show(self.base)} to {self.show(self.tuned)}"
        if self.rows < LEAST_ROWS:
            few = f"{rows} {agreed(self.rows, 'is', 'are')} too few to tell"
            return f"{self.name}: {few}, {change}; a verdict needs at least {LEAST_ROWS}"
        if self.verdict == "not judged":
            together = f"difference {self.show_change(self.difference)}; of all answers together, without an interval"
            return f"{self.name}: not judged, {change} ({together})"
        span = f"95 % interval {self.span}" if self.span != "-" else "no interval: every draw of rows gives the same"
        head = f"{self.verdict} with {rows}" if self.verdict == "not distinguishable" else f"{self.verdict} on {rows}"
        rough = "; so few rows give a rough interval" if self.rows < ROUGH_ROWS else ""
        return f"{self.name}: {head}, {change} (difference {self.show_change(self.difference)}, {span}){rough}"

    def show(self, value: float) -> str:
        """A value as people read it."""
        return f"{100 * value:.1f} %" if self.percent else _digits(value)

    def show_change(self, value: float) -> str:
        """A difference as people read it: with its sign, shares in points of per cent."""
        sign = "" if abs(value) < _NOISE else "+" if value > 0 else "-"
        return f"{sign}{100 * abs(value):.1f} points" if self.percent else f"{sign}{_digits(abs(value))}"

    @property
    def span(self) -> str:
        """The interval of the difference, as people read it; - where a bootstrap of rows that are all alike has no
        width.
        """
        return "-" if self.low == self.high else f"{self.show_change(self.low)} to {self.show_change(self.high)}"

    @property
    def tuned_span(self) -> str:
        """The interval of the tuned model's value itself, as people read it; - where rows are too few for one, or it
        has no width in the digits that are shown.
        """
        low, high = self.show(self.tuned_low), self.show(self.tuned_high)
        return "-" if self.rows < LEAST_ROWS or low == high else f"{low} to {high}"

    def to_json(self) -> JsonObject:
        """All fields and the sentence; null where a value has no interval."""
        absent = ("tuned_low", "tuned_high", "low", "high", "rows_better", "rows_worse")
        lacks: JsonObject = dict.fromkeys(absent) if self.verdict == "not judged" else {}
        return {**asdict(self), **lacks, "sentence": self.sentence}


def _digits(value: float) -> str:
    """Four significant digits where they help, without an exponent where one is not needed."""
    if abs(value) < _NOISE:
        return "0"
    if 0.001 <= abs(value) < 100_000:
        rounded = float(f"{abs(value):.3e}")  # 0.99999 is one of 1.000
        return f"{value:.{max(0, min(4, 3 - int(np.floor(np.log10(rounded)))))}f}"
    return f"{value:.3e}"


def compare(
    name: str,
    metric: Metric,
    base_rows: Sequence[RowScore],
    tuned_rows: Sequence[RowScore],
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> list[Comparison]:
    """One Comparison for each value of the metric; both lists hold the same rows in the same order, all usable.

    Args:
        name: The metric's name.
        metric: The metric.
        base_rows: Scores of the base model, `[rows]`.
        tuned_rows: Scores of the tuned model, `[rows]`.
        seed: Decides the draws; the same seed gives the same interval.
        resamples: How often rows are drawn.

    Raises:
        ValueError: No rows, or two lists of different length.
    """
    if not base_rows or len(base_rows) != len(tuned_rows):
        raise ValueError(f"paired rows are needed, not {len(base_rows)} and {len(tuned_rows)}")
    base, tuned = (np.asarray(metric.row_sums(rows), dtype=np.float64) for rows in (base_rows, tuned_rows))
    base_values, tuned_values = metric.values(base.sum(axis=0).tolist()), metric.values(tuned.sum(axis=0).tolist())
    drawn_base, drawn_tuned = bootstrap_values(metric, base, tuned, seed=seed, resamples=resamples)
    tail = (1 - CONFIDENCE) / 2
    lows, highs = np.quantile(drawn_tuned - drawn_base, [tail, 1 - tail], axis=0)
    tuned_lows, tuned_highs = np.quantile(drawn_tuned, [tail, 1 - tail], axis=0)
    is_whole = [value_name in metric.whole for value_name in base_values]
    if metric.percent and is_share(base) and is_share(tuned):
        lows[0], highs[0] = share_difference_interval(base[:, 0], tuned[:, 0])
        tuned_lows[0], tuned_highs[0] = share_interval(float(tuned[:, 0].sum()), len(tuned))
    by_row = values_of_sums(metric, tuned) - values_of_sums(metric, base)
    by_row[:, is_whole] = 0.0
    for column in np.flatnonzero(is_whole).tolist():
        before, after = list(base_values.values())[column], list(tuned_values.values())[column]
        lows[column] = highs[column] = after - before
        tuned_lows[column] = tuned_highs[column] = after
    sign = 1.0 if metric.better == "higher" else -1.0
    found = []
    for column, value_name in enumerate(base_values):
        low, high = float(lows[column]), float(highs[column])
        found.append(
            Comparison(
                metric=name,
                name=value_name,
                better=metric.better,
                percent=metric.percent,
                base=base_values[value_name],
                tuned=tuned_values[value_name],
                tuned_low=float(tuned_lows[column]),
                tuned_high=float(tuned_highs[column]),
                difference=tuned_values[value_name] - base_values[value_name],
                low=low,
                high=high,
                rows=len(base_rows),
                rows_better=int((sign * by_row[:, column] > 0).sum()),
                rows_worse=int((sign * by_row[:, column] < 0).sum()),
                verdict="not judged" if is_whole[column] else judge(low, high, metric.better, len(base_rows)),
            )
        )
    return found


def judge(low: float, high: float, better: Literal["lower", "higher"], rows: int) -> Judged:
    """What an interval of tuned - base says: a direction only where it leaves out 0 and the rows are enough."""
    if rows < LEAST_ROWS:
        return "too few rows"
    if low <= 0 <= high:
        return "not distinguishable"
    return "better" if (low > 0) == (better == "higher") else "worse"


def bootstrap_values(
    metric: Metric, base: Floats, tuned: Floats, *, seed: int, resamples: int
) -> tuple[Floats, Floats]:
    """Every value of base and of tuned model on the same resampled rows, each `[resamples, values]`.

    Args:
        metric: Turns sums into values.
        base: Row sums of the base model, `[rows, k]`.
        tuned: Row sums of the tuned model, `[rows, k]`.
        seed: Decides the draws.
        resamples: How often rows are drawn.
    """
    chunks = [
        (values_of_sums(metric, counts @ base), values_of_sums(metric, counts @ tuned))
        for counts in draw_counts(len(base), resamples, seed)
    ]
    of_base, of_tuned = (np.concatenate(side) for side in zip(*chunks, strict=True))
    return of_base, of_tuned


def values_of_sums(metric: Metric, sums: Floats) -> Floats:
    """The metric's values of each line of sums, `[lines, values]`."""
    found = [value for line in sums for value in metric.values(line.tolist()).values()]  # no list or dict a line stays:
    return np.array(found).reshape(len(sums), -1)  # Python's collector would look through all of torch for each few


def draw_counts(rows: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each row is drawn in each resample, in chunks `[some resamples, rows]`; every line sums to `rows`."""
    rng = np.random.default_rng(seed)
    chunk = max(1, min(resamples, _CHUNK_CELLS // rows))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        draws = rng.integers(0, rows, size=(size, rows)) + rows * np.arange(size)[:, None]
        yield np.bincount(draws.ravel(), minlength=size * rows).reshape(size, rows).astype(np.float64)
