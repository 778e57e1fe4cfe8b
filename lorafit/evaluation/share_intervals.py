"""Intervals of shares of rows, which keep a width where every row is right and a bootstrap would draw a constant.

    one share               Wilson's score interval
    a paired difference     Newcombe's: both Wilson intervals, squared and added, less what the pairs have in common
    one of other rows       the same with nothing in common

                    base right   base wrong
    tuned right          e            f
    tuned wrong          g            h             difference = (f - g) / rows

Source: Wilson (1927), "Probable Inference, the Law of Succession, and Statistical Inference", J. Am. Stat. Assoc. 22;
Newcombe (1998), "Improved confidence intervals for the difference between binomial proportions based on paired data",
Statistics in Medicine 17, 2635-2650, method 10; of other rows: "Interval estimation for the difference between
independent proportions: comparison of eleven methods", ibid. 873-890, method 10.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_NORMAL = 1.959963984540054  # 97.5 % quantile of the normal distribution, for intervals of 95 %

Floats = npt.NDArray[np.float64]


def is_share(sums: Floats) -> bool:
    """Whether row sums `[rows, k]` are those of a share of rows: 1 or 0, and 1."""
    return sums.shape[1] == 2 and bool((sums[:, 1] == 1).all() and np.isin(sums[:, 0], (0.0, 1.0)).all())


def share_interval(right: float, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share: lower and upper end, 0 to 1.

    Args:
        right: Rows of which it is true.
        rows: All.
    """
    share, square = right / rows, _NORMAL**2 / rows
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def difference_of_shares(base_right: float, base_rows: int, right: float, rows: int) -> tuple[float, float]:
    """The 95 % interval of one share less another, of rows that are no pairs (Newcombe 1998, unpaired, method 10).

    Args:
        base_right: Rows of which it is true, of those that are compared with.
        base_rows: All of those.
        right: Rows of which it is true.
        rows: All.
    """
    (base_low, base_high), (low, high) = share_interval(base_right, base_rows), share_interval(right, rows)
    base_share, share = base_right / base_rows, right / rows
    down = math.hypot(share - low, base_high - base_share)
    up = math.hypot(high - share, base_share - base_low)
    return share - base_share - down, share - base_share + up


def share_difference_interval(base: Floats, tuned: Floats) -> tuple[float, float]:
    """The 95 % interval of tuned share - base share, on the same rows: lower and upper end, -1 to 1.

    Args:
        base: 1 or 0 for each row of the base model, `[rows]`.
        tuned: The same of the tuned model.
    """
    rows, of_base, of_tuned = len(base), float(base.sum()), float(tuned.sum())
    both = float((base * tuned).sum())
    only_tuned, only_base = of_tuned - both, of_base - both
    neither = rows - both - only_tuned - only_base
    product = of_tuned * (rows - of_tuned) * of_base * (rows - of_base)
    common = both * neither - only_tuned * only_base
    common = max(0.0, common - rows / 2) if common > 0 else common  # Newcombe's continuity correction
    correlation = common / math.sqrt(product) if product else 0.0
    (base_low, base_high), (tuned_low, tuned_high) = (share_interval(n, rows) for n in (of_base, of_tuned))
    base_share, tuned_share = of_base / rows, of_tuned / rows

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * correlation * one * other + other**2))

    down = reach(tuned_share - tuned_low, base_high - base_share)
    up = reach(tuned_high - tuned_share, base_share - base_low)
    return tuned_share - base_share - down, tuned_share - base_share + up
