"""From prepared rows to micro-batches, all of it pure functions.

(seed, epoch) --epoch_order--> rows of the epoch --StepRows--> rows of a step --cut_step--> micro-batches
                                                     └─ EasyFirst: of the easiest ones only

rows of a step by length     ████████████ ██████████ | █████ ████ ████ | ██ ██ █        | = where cut_step cuts
as padded micro-batches      ████████████             █████             ██
                             ██████████░░             ████░             ██
                                                      ████░             █░      ░ = padding
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lorafit.contracts import Examples
from lorafit.kinds.curricula import pool_size

Integers = NDArray[np.int64]

_EPOCHS_KEPT = 4
_POOL_KEY = 4  # tells the draw of a step from the orders of epochs
MICRO_BATCH_COST_TOKENS = 96
"""About what starting a forward and its backward costs on a CPU (mostly unpacking NF4 weights, which takes as long on
large models as on small ones beside their products), so that cuts are not too fine: 87 tokens measured."""
LIKELY_GPU_COST_TOKENS = 700
"""The same on a card where it cannot be measured (`lorafit.trainer.rehearsal` does): some 10,000 kernels are started,
whatever their size. Counted and guessed for Llama-3.1-8B on an H100; 190 on a slower card, 2,500 for a model of 1B."""
_LEAST_SHARE, _TRIED_BUDGETS = 0.5, 11  # of the budget, where threads run at once: down to half in 5 % steps
_MOST_PARTS_A_RANK = 8  # of a budget-filling step, where ranks share it


def shuffle(count: int, *key: int) -> Integers:
    """0 to count - 1 in an order that `key` alone decides, on every machine and numpy version.

    Each number is mixed with the key by SplitMix64's finaliser, a bijection of 64-bit integers; then they are sorted.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014), section 5, with the
    constants of java.util.SplittableRandom.
    """
    state = np.uint64(0)
    for part in key:
        state = _mix(np.array([state ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF)], dtype=np.uint64))[0]
    with np.errstate(over="ignore"):
        numbers = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + state
    return np.argsort(_mix(numbers), kind="stable").astype(np.int64)


def _mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return numbers ^ (numbers >> np.uint64(31))


def _partial_rows(count: int, repeats: float) -> int:
    """How many rows of a source an epoch sees once more than the rest; at least one where any is asked for."""
    share = repeats - int(repeats)
    return min(count, max(1, round(share * count))) if share > 1e-9 and count else 0


def rows_per_epoch(examples: Examples) -> int:
    """Rows of one epoch, repeats counted; the same for every epoch."""
    counts = np.bincount(np.asarray(examples.source_of, dtype=np.int64), minlength=len(examples.repeats))
    return sum(
        int(count) * int(repeats) + _partial_rows(int(count), repeats)
        for count, repeats in zip(counts, examples.repeats, strict=True)
    )


def epoch_order(examples: Examples, seed: int, epoch: int) -> Integers:
    """Row numbers of one epoch in the order in which they are trained on, `[rows_per_epoch]`.

    `repeats: 2` holds each row twice. `repeats: 0.5` holds another half each epoch: the seed fixes an order of the
    source's rows, and each epoch goes on in it where the last one stopped, so that rows are seen equally often.

    Args:
        epoch: From 0.
    """
    chosen = []
    source_of = np.asarray(examples.source_of, dtype=np.int64)
    for source, repeats in enumerate(examples.repeats):
        rows = np.flatnonzero(source_of == source)
        chosen += [rows] * int(repeats)
        partial = _partial_rows(len(rows), repeats)
        if partial:
            places = (np.arange(partial) + epoch * partial) % len(rows)
            chosen.append(rows[shuffle(len(rows), seed, source, 1)[places]])
    together = np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)
    return together[shuffle(len(together), seed, epoch, 2)]


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Optimizer steps of an epoch of that many rows; a last, smaller step is kept."""
    return -(-rows // batch_size)


@dataclass(frozen=True)
class EasyFirst:
    """Draws steps from the easiest rows of their epoch, until the share of these is 1.

    Attributes:
        difficulty: Of each row, the larger the harder, `[rows]`.
        share: Share of the epoch's rows that a step is drawn from (0 to 1), by the step's number.
    """

    difficulty: NDArray[np.float64]
    share: Callable[[int], float]


class StepRows:
    """The rows of every optimizer step: a function of (seed, step) alone, whatever was asked before.

    Args:
        batch_size: Rows of a step; the last of an epoch may have fewer.
        easy_first: Whether harder rows wait; a step has as many rows as it would have without.
    """

    def __init__(self, examples: Examples, seed: int, batch_size: int, easy_first: EasyFirst | None = None) -> None:
        self._rows, self.batch_size = rows_per_epoch(examples), batch_size
        self._seed, self._easy_first = seed, easy_first
        self.steps_per_epoch = steps_per_epoch(self._rows, batch_size)
        self._order = lru_cache(maxsize=_EPOCHS_KEPT)(lambda epoch: epoch_order(examples, seed, epoch))
        self._easiest = lru_cache(maxsize=_EPOCHS_KEPT)(self._easiest_first)

    def _easiest_first(self, epoch: int) -> Integers:
        """Rows of an epoch, the easiest first; of equally hard ones the order is the epoch's."""
        assert self._easy_first is not None
        order = self._order(epoch)
        return order[np.argsort(self._easy_first.difficulty[order], kind="stable")]

    def rows(self, step: int) -> tuple[float, list[int]]:
        """Epochs that are done after the step, and the numbers of its rows.

        Args:
            step: From 1; may be beyond the first epoch.
        """
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        start = place * self.batch_size
        rows = self._order(epoch)[start : start + self.batch_size]
        if self._easy_first is not None and (share := self._easy_first.share(step)) < 1.0:
            pool = self._easiest(epoch)[: pool_size(share, self._rows, len(rows))]
            rows = pool[shuffle(len(pool), self._seed, step, _POOL_KEY)[: len(rows)]]
        return epoch + (start + len(rows)) / self._rows, [int(row) for row in rows]


def cut_step(
    rows: Sequence[int],
    lengths: Sequence[int],
    token_budget: int,
    at_once: int = 1,
    ranks: int = 1,
    cost_tokens: int = MICRO_BATCH_COST_TOKENS,
) -> list[list[int]]:
    """Cuts the rows of a step into micro-batches, the longest rows first.

    Among all cuts of the rows sorted by length that keep `rows x longest` of a micro-batch within the budget, it takes
    the one with the fewest padded tokens, where each micro-batch counts as `cost_tokens` more. A row longer than the
    budget is a micro-batch of its own. Where several run at once it looks at smaller budgets too, and takes
    what is done first: two micro-batches for two cores rather than three. What a step computes does not depend on the
    cut, speed and memory do.

    Args:
        rows: Row numbers; may repeat.
        lengths: Tokens of each row of the whole set, by row number.
        token_budget: Padded tokens of a micro-batch.
        at_once: Micro-batches that run at the same time in a process.
        ranks: Processes that share them.
        cost_tokens: What starting a micro-batch costs.
    """
    if not rows:
        return []
    ordered = sorted(rows, key=lambda row: (-int(lengths[row]), row))
    tokens = np.array([int(lengths[row]) for row in ordered], dtype=np.int64)
    shares = np.linspace(1.0, _LEAST_SHARE, _TRIED_BUDGETS) if at_once > 1 else (1.0,)
    budgets = (int(budget * share) for budget in rank_budgets(token_budget, ranks) for share in shares)
    workers = at_once * ranks
    best = min(
        (_cut_within(tokens, budget, cost_tokens) for budget in budgets),
        key=lambda parts: span_tokens([len(part) * int(tokens[part.start]) for part in parts], workers, cost_tokens),
    )
    return [ordered[part.start : part.stop] for part in best]


def rank_budgets(token_budget: int, ranks: int) -> list[int]:
    """The budget, and where ranks share a step smaller ones to look at: few rows must reach all of them.

    Whole numbers throughout: a machine that rounds otherwise would cut otherwise, and rows be lost between the ranks.
    """
    budgets = [token_budget]
    while ranks > 1 and budgets[-1] * _MOST_PARTS_A_RANK * ranks > token_budget:
        budgets.append(budgets[-1] * 5 // 6)
    return budgets


def _cut_within(tokens: Integers, token_budget: int, cost_tokens: int) -> list[range]:
    """Places of each micro-batch's rows among tokens [rows], the longest first; the least sum of their costs."""
    count = len(tokens)
    cheapest = np.zeros(count + 1, dtype=np.int64)  # of rows i.. to the end
    cut_at = np.zeros(count, dtype=np.int64)
    for first in range(count - 1, -1, -1):
        widest = max(1, token_budget // max(1, int(tokens[first])))
        ends = np.arange(first + 1, min(count, first + widest) + 1)
        costs = cost_tokens + tokens[first] * (ends - first) + cheapest[ends]
        best = int(np.argmin(costs))
        cheapest[first], cut_at[first] = costs[best], ends[best]
    parts, place = [], 0
    while place < count:
        parts.append(range(place, int(cut_at[place])))
        place = parts[-1].stop
    return parts


def deal(padded_tokens: Sequence[int], workers: int, cost_tokens: int = MICRO_BATCH_COST_TOKENS) -> list[list[int]]:
    """Numbers of the micro-batches that each worker runs, ascending: the largest first, to whoever is free first.

    Args:
        padded_tokens: Of each micro-batch.
        workers: Cores or ranks; 1 where all work on one micro-batch.
        cost_tokens: What starting a micro-batch costs.
    """
    free = [(0, worker) for worker in range(workers)]  # when, and who
    dealt: list[list[int]] = [[] for _ in range(workers)]
    for number in sorted(range(len(padded_tokens)), key=lambda number: -padded_tokens[number]):
        busy_until, worker = free[0]
        dealt[worker].append(number)
        heapq.heapreplace(free, (busy_until + cost_tokens + padded_tokens[number], worker))
    return [sorted(numbers) for numbers in dealt]


def span_tokens(padded_tokens: Sequence[int], workers: int, cost_tokens: int = MICRO_BATCH_COST_TOKENS) -> int:
    """How long micro-batches take that are dealt so; in tokens of one worker."""
    return max(
        sum(cost_tokens + padded_tokens[number] for number in numbers)
        for numbers in deal(padded_tokens, workers, cost_tokens)
    )
