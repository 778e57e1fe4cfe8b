"""One choice for each item, of the least value together, at a cost within a budget: the multiple-choice knapsack.

Item by item, every total that no other one beats in both cost and value is kept with the choices that led to it. That
is exact; where more totals are left than `most`, only the best one of each of so many equal ranges of cost is.

Source: Kellerer, Pferschy and Pisinger (2004), "Knapsack Problems", section 11.5 (dynamic programming with lists).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def choose(
    costs: Sequence[Mapping[str, int]], values: Sequence[Mapping[str, float]], budget: int, *, most: int = 20_000
) -> list[str]:
    """A name for each item.

    Args:
        costs: Of each item, by the names that may be chosen for it.
        values: By the same names; what is to be small. Of equal ones the cheaper is taken.
        budget: What all costs together may be. The cheapest names must fit.
        most: Totals that are kept.
    """
    import numpy as np

    left = np.cumsum([min(cost.values()) for cost in reversed(costs)])[
        ::-1
    ]  # what the items from here on cost at least
    spent, value = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[tuple[list[str], np.ndarray]] = []
    for number, (cost, worth) in enumerate(zip(costs, values, strict=True)):
        names = list(cost)
        rest = int(left[number + 1]) if number + 1 < len(costs) else 0
        totals = np.concatenate([spent + cost[name] for name in names])
        worths = np.concatenate([value + worth[name] for name in names])
        kept = np.lexsort((worths, totals))
        kept = kept[totals[kept] + rest <= budget]
        best = np.minimum.accumulate(worths[kept])
        kept = kept[np.r_[True, best[1:] < best[:-1]]]
        if len(kept) > most:
            low, high = int(totals[kept[0]]), int(totals[kept[-1]])
            ranges = (totals[kept] - low) * most // (high - low + 1)
            kept = kept[np.r_[ranges[1:] != ranges[:-1], True]]  # the last one of a range is worth the least
        steps.append((names, kept))
        spent, value = totals[kept], worths[kept]
    chosen, place = [], len(value) - 1
    for (names, kept), before in zip(reversed(steps), [*(len(kept) for _, kept in steps[-2::-1]), 1], strict=True):
        which, place = divmod(int(kept[place]), before)
        chosen.append(names[which])
    return chosen[::-1]
