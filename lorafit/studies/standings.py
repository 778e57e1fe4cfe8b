"""Which of several methods can be told apart by runs with a few seeds, scored on the same test rows.

    sums     [methods, seeds, rows, k]   what each run scored of each test row
    value    [methods, seeds]            the metric of a run: a function of its sums over rows
    drawn    [resamples, methods]        the same over rows drawn with replacement, averaged over seeds

A difference between two methods is the mean over seeds of what two runs with the same seed differ by. Two things make
it uncertain, and both enter: which seeds were run, and which rows were scored.

    variance   s^2 / S + v       s^2: variance of the S differences by seed; v: variance of the drawn differences
    half own   t(df) sqrt(s^2 / S + v)        by the two methods' own runs; df by Welch and Satterthwaite
    half all   q sqrt(s0^2 / S + v)           s0^2: the median of all pairs' s^2, made unbiased
    interval   the ends further out           two methods differ where it leaves out 0

q makes it hold for all pairs at once, so that the best may be chosen by the same figures: it is the 95 % quantile of
the largest such ratio among methods that are the same, by simulation. A variance of three seeds is rough, and where
many pairs are looked at, one of them is small by luck: therefore the median of all. A method whose runs scatter more
than the others' is judged by its own as well; of losses, which scatter the more the higher they are, by their ratios.

Source: Tukey (1953), "The problem of multiple comparisons" (all pairs at once, by the distribution of the range);
Satterthwaite (1946), "An approximate distribution of estimates of variance components", Biometrics Bulletin 2, 110-114;
Efron and Tibshirani (1993), "An Introduction to the Bootstrap", chapter 6 (standard errors).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Literal

import numpy as np

from lorafit.contracts import JsonObject
from lorafit.evaluation.share_intervals import is_share, share_difference_interval, share_interval
from lorafit.evaluation.statistics import CONFIDENCE, Floats, draw_counts, judge, values_of_sums
from lorafit.kinds.metrics import Metric

RESAMPLES = 2_000
"""For a standard error, not for a quantile: a variance of so many draws is right to 3 %."""
_SIMULATED = 20_000
_ANGLES = 20_001
_WILSON_WIDTH = 1.959963984540054
_LARGEST_LOG_RATIO = 50.0  # of an interval that says nothing
Verdict = Literal["best", "not distinguishable", "worse", "better", "too few rows"]


@dataclass(frozen=True, slots=True)
class Standing:
    """One method's value of one metric, and how it stands to the best method.

    Attributes:
        method: Its name; `base` for the base model.
        value: The metric, averaged over seeds.
        low: Lower end of the value's 95 % interval, over seeds and rows.
        high: Upper end.
        by_seed: The metric of each run, by seed; of the base one value.
        difference: Value - the best method's, averaged over seeds.
        difference_low: Lower end of its 95 % interval, which holds for all pairs of methods at once.
        difference_high: Upper end.
        verdict: What that interval says.
    """

    method: str
    value: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    difference: float
    difference_low: float
    difference_high: float
    verdict: Verdict

    def to_json(self) -> JsonObject:
        """All fields."""
        return asdict(self)


def t_quantile(df: float, confidence: float = CONFIDENCE) -> float:
    """Student's t that bounds the middle of its distribution.

    With t = sqrt(df) tan(a) the density is cos(a)^(df - 1), whose integral is summed by the trapezoidal rule.

    Args:
        df: Degrees of freedom, more than 0.
        confidence: Share of the distribution between -t and t.
    """
    angles = np.linspace(0, math.pi / 2, _ANGLES)
    density = np.cos(angles) ** (df - 1) if df >= 1 else np.maximum(np.cos(angles), 1e-12) ** (df - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(df) * math.tan(float(np.interp(confidence, below / below[-1], angles)))


@cache
def family_quantiles(methods: int, seeds: int) -> tuple[float, float, float]:
    """What bounds all pairs of methods that are the same, with 95 % confidence; simulated, with a fixed seed.

    Returns:
        q where only seeds scatter, q where only rows do, and what makes the median of the pairs' variances unbiased.
    """
    values = np.random.default_rng(0).standard_normal((_SIMULATED, methods, seeds))
    one, other = np.triu_indices(methods, 1)
    differences = values[:, one] - values[:, other]
    medians = np.median(differences.var(axis=2, ddof=1), axis=1)
    correction = 2.0 / float(medians.mean())
    ratios = np.abs(differences.mean(axis=2)).max(axis=1) / np.sqrt(correction * medians / seeds)
    ranges = np.ptp(values[:, :, 0], axis=1) / math.sqrt(2)
    return float(np.quantile(ratios, CONFIDENCE)), float(np.quantile(ranges, CONFIDENCE)), correction


def stand(
    metric: Metric, sums: Mapping[str, Floats], base: Floats | None, *, seed: int, resamples: int = RESAMPLES
) -> dict[str, list[Standing]]:
    """Each method's standing in each value of a metric, methods in the order given, the base behind them.

    Args:
        metric: The metric.
        sums: By method, `[seeds, rows, k]`: the same seeds and the same rows in the same order for all.
        base: The base model's, `[rows, k]`; None where it was not scored.
        seed: Decides the drawn rows.
        resamples: How often rows are drawn.
    """
    runs = np.stack(list(sums.values()))  # [methods, seeds, rows, k]
    if base is not None:
        runs = np.concatenate([runs, np.broadcast_to(base, runs.shape[1:])[None]])
    drawn = _drawn_values(metric, runs, seed, resamples)
    names = list(metric.values(runs[0, 0].sum(axis=0).tolist()))
    values = np.stack([values_of_sums(metric, of_seeds.sum(axis=1)) for of_seeds in runs])  # [methods, seeds, values]
    found = {}
    for column, name in enumerate(names):
        table = _Table(metric, runs, values[:, :, column], drawn[:, :, column], len(sums))
        methods = [*sums, *(["base"] if base is not None else [])]
        found[name] = [table.standing(number, method) for number, method in enumerate(methods)]
    return found


def _drawn_values(metric: Metric, runs: Floats, seed: int, resamples: int) -> Floats:
    """`[resamples, methods, values]`: over the same drawn rows for all, averaged over seeds."""
    rows = runs.shape[2]
    chunks = []
    for counts in draw_counts(rows, resamples, seed):
        each = [[values_of_sums(metric, counts @ run) for run in of_seeds] for of_seeds in runs]
        chunks.append(np.asarray(each).mean(axis=1).transpose(1, 0, 2))
    return np.concatenate(chunks)


class _Table:
    """One value of a metric for all methods, from which standings are read.

    Args:
        metric: The metric.
        runs: `[methods, seeds, rows, k]`, the base's last where it was scored.
        values: `[methods, seeds]`.
        drawn: `[resamples, methods]`.
        methods: Their number, the base apart.
    """

    def __init__(self, metric: Metric, runs: Floats, values: Floats, drawn: Floats, methods: int) -> None:
        self._metric, self._runs, self._values, self._drawn, self._methods = metric, runs, values, drawn, methods
        self._seeds, self._rows = runs.shape[1], runs.shape[2]
        self._is_positive = metric.better == "lower" and values.min() > 0 and drawn.min() > 0
        means = values[:methods].mean(axis=1)
        self._best = int(means.argmin() if metric.better == "lower" else means.argmax())
        self._family = family_quantiles(methods, self._seeds) if methods > 1 else (0.0, 0.0, 1.0)
        one, other = np.triu_indices(methods, 1)
        pairs = (values[one] - values[other]).var(axis=1, ddof=1)
        self._usual = self._family[2] * float(np.median(pairs)) if methods > 1 else 0.0

    def standing(self, number: int, method: str) -> Standing:
        """The method of a number."""
        own, best = self._values[number], self._values[self._best]
        value, difference = float(own.mean()), float((own - best).mean())
        half = self._half_of_value(number)
        low, high = self._ends_of_difference(number) if number != self._best else (0.0, 0.0)
        verdict = "best" if number == self._best else judge(low, high, self._metric.better, self._rows)
        by_seed = tuple(map(float, own if method != "base" else own[:1]))
        least = 0.0 if self._is_positive or self._metric.percent else -math.inf
        ends = max(least, value - half), min(1.0 if self._metric.percent else math.inf, value + half)
        return Standing(method, value, *ends, by_seed, difference, low, high, verdict)

    def _half_of_value(self, number: int) -> float:
        of_rows = float(self._drawn[:, number].var(ddof=1))
        if self._metric.percent and all(is_share(run) for run in self._runs[number]):
            right = float(self._runs[number, :, :, 0].sum(axis=1).mean())
            low, high = share_interval(right, self._rows)  # has a width where all rows are right
            of_rows = max(of_rows, ((high - low) / 2 / _WILSON_WIDTH) ** 2)
        return self._own_half(float(self._values[number].var(ddof=1)), of_rows)

    def _ends_of_difference(self, number: int) -> tuple[float, float]:
        """The ends that lie further out, by all pairs and by the two methods' own runs."""
        values, drawn = self._values, self._drawn
        of_rows = float((drawn[:, number] - drawn[:, self._best]).var(ddof=1))
        by_seeds, by_rows, _ = self._family
        usual = self._usual / self._seeds
        share = usual / (usual + of_rows) if usual + of_rows else 1.0
        half = (by_rows + (by_seeds - by_rows) * share) * math.sqrt(usual + of_rows)
        half = half if number < self._methods else 0.0  # the base is no method, and by its best one's runs alone
        difference = float((values[number] - values[self._best]).mean())
        if of_rows == 0 and self._metric.percent:  # no row tells them apart, and so few rows do not say that none would
            of_rows = self._variance_of_shares(number)
            half = max(half, by_rows * math.sqrt(of_rows))
        if self._is_positive:
            values, drawn = np.log(values), np.log(drawn)
        own = values[number] - values[self._best]
        own_rows = float((drawn[:, number] - drawn[:, self._best]).var(ddof=1)) or of_rows
        own_half = self._own_half(float(own.var(ddof=1)), own_rows)
        low, high = float(own.mean()) - own_half, float(own.mean()) + own_half
        if values is not self._values:
            scale = float(self._values[self._best].mean())
            low, high = scale * math.expm1(low), scale * math.expm1(min(high, _LARGEST_LOG_RATIO))
        return min(difference - half, low), max(difference + half, high)

    def _variance_of_shares(self, number: int) -> float:
        """Of the difference to the best between shares of rows, by Newcombe's interval; 0 where they are none."""
        one, best = self._runs[number], self._runs[self._best]
        if not all(is_share(run) for run in (*one, *best)):
            return 0.0
        ends = [share_difference_interval(b[:, 0], a[:, 0]) for a, b in zip(one, best, strict=True)]
        return max(((high - low) / 2 / _WILSON_WIDTH) ** 2 for low, high in ends)

    def _own_half(self, of_seeds: float, of_rows: float) -> float:
        mean = of_seeds / self._seeds
        total = mean + of_rows
        if total == 0:
            return 0.0
        inverse_df = (mean**2 / (self._seeds - 1) + of_rows**2 / max(1, self._rows - 1)) / total**2
        return t_quantile(1 / inverse_df) * math.sqrt(total)


def groups(standings: Sequence[Standing]) -> tuple[list[str], list[str]]:
    """Methods that cannot be told from the best, itself among them, and those that are worse; best values first."""
    among = [each for each in standings if each.method != "base"]
    order = sorted(among, key=lambda each: abs(each.difference))
    same = [each.method for each in order if each.verdict != "worse"]
    return same, [each.method for each in order if each.verdict == "worse"]
