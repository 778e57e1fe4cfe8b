"""The heaviest micro-batches that a run can meet under a token budget, made of its own rows.

    widest    as many of the longest rows as the budget takes: most attention a token
    fullest   the width that leaves the least of the budget unused: most tokens

Packed rows are filled to the last token, and hold two documents at least, so that whatever keeps them apart is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lorafit.contracts import Example, Examples
    from lorafit.objective import TrainedTask


def heaviest_shapes(
    lengths: Sequence[int], token_budget: int, most_rows: int, *, one_row: bool
) -> list[tuple[int, int]]:
    """(rows, tokens of each) of the heaviest micro-batches.

    Args:
        lengths: Tokens of each row of the set.
        token_budget: Padded tokens of a micro-batch.
        most_rows: Rows of a step; a micro-batch never holds more.
        one_row: Whether packed documents fill one row as long as the budget.
    """
    widths, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    longest = int(widths[-1])
    if one_row:
        return [(1, max(token_budget, longest))]
    rows = np.minimum(np.minimum(token_budget // widths, np.cumsum(counts)), most_rows)
    rows[-1] = max(1, rows[-1])
    tokens = rows * widths
    fullest = int(np.flatnonzero(tokens == tokens.max())[-1])
    return [(int(rows[place]), int(widths[place])) for place in dict.fromkeys((len(widths) - 1, fullest))]


def fill_rows(task: TrainedTask, examples: Examples, rows: int, width: int, *, packing: bool) -> list[list[Example]]:
    """Documents of so many rows of `width` tokens: the longest rows of the set, cut to fit (the end of them is kept).

    Fewer, or shorter ones, where the set is too small.
    """
    longest_first = np.argsort(-np.asarray(examples.lengths), kind="stable").tolist()
    if not packing:
        return [[task.cut(examples[row], width)] for row in longest_first[:rows]]
    left = iter(longest_first)
    filled = (list(_fill(task, examples, left, width)) for _ in range(rows))
    return [documents for documents in filled if documents]


def _fill(task: TrainedTask, examples: Examples, rows: Iterator[int], width: int) -> Iterator[Example]:
    left = width
    while left and (row := next(rows, None)) is not None:
        tokens = min(left, -(-width // 2), int(examples.lengths[row]))
        left -= tokens
        yield task.cut(examples[row], tokens)
