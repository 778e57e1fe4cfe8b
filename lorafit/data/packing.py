"""How the rows of a step become micro-batches: padded, or packed. All of it pure functions, but for `Cutter`.

Packed, several documents stand in one row. Positions start anew with each, attention stays inside each, and what is
left behind the last one is padding, a document of its own that nobody looks at:

    documents of a step     AAAAAAAA  BBBBB  CCC  DD
    packed rows             AAAAAAAA                 positions   0 1 2 3 4 5 6 7
                            BBBBBCCC                             0 1 2 3 4 0 1 2
                            DD░░░░░░                             0 1 0 1 2 3 4 5      ░ = padding

    what a position sees    A ■                      B ■
    (row 1, row 2)            ■■                       ■■
                              ■■■                      ■■■
                              ■■■■ ...                 ■■■■
                                                       ■■■■■
                                                     C      ■
                                                            ■■
                                                            ■■■

The rows of a step are the same either way, and so are its loss and its gradient; only its cut differs.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from lorafit.contracts import Batch, Examples
from lorafit.data.batch import MICRO_BATCH_COST_TOKENS, cut_step, deal, rank_budgets, span_tokens
from lorafit.objective import TrainedTask
from lorafit.ops.attention_kernels import VARIABLE_LENGTH_ATTENTION, packs

PackedRow = list[int]
"""Numbers of the documents that stand in one row of a micro-batch."""
MicroBatch = list[PackedRow]
"""Rows of one forward pass."""

PACKED_ROW_TOKENS = 256
"""Up to this length masked attention over a whole row costs next to nothing beside the linear layers."""


def pack_rows(rows: Sequence[int], lengths: Sequence[int], row_tokens: int) -> list[PackedRow]:
    """Puts documents together into rows of at most `row_tokens`: best-fit decreasing.

    Longest first, each document goes where the least room is left behind it, else into a new row. A document longer
    than a row is a row of its own. At most 11/9 of the fewest possible rows, plus a constant.

    Source: Johnson, Near-optimal bin packing algorithms (MIT, 1973), best-fit decreasing.

    Args:
        rows: Row numbers; may repeat.
        lengths: Tokens of each row of the whole set, by row number.
        row_tokens: Tokens of a packed row.
    """
    packed: list[PackedRow] = []
    room: list[tuple[int, int]] = []  # (tokens left, number of the packed row), ascending
    for row in sorted(rows, key=lambda row: (-int(lengths[row]), row)):
        tokens = int(lengths[row])
        place = bisect.bisect_left(room, (tokens, -1))
        if place < len(room):
            left, number = room.pop(place)
        else:
            left, number = max(row_tokens, tokens), len(packed)
            packed.append([])
        packed[number].append(row)
        if left > tokens:
            bisect.insort(room, (left - tokens, number))
    return packed


def cut_packed(
    rows: Sequence[int],
    lengths: Sequence[int],
    token_budget: int,
    *,
    one_row: bool,
    at_once: int = 1,
    ranks: int = 1,
    cost_tokens: int = MICRO_BATCH_COST_TOKENS,
) -> list[MicroBatch]:
    """Cuts the rows of a step into micro-batches of packed rows; the plain cut where packing saves nothing.

    With `one_row` a micro-batch is one row as long as the budget, without any padding: for attention that computes each
    document by itself. Else attention goes over whole rows, masked: no packed row is longer than the step's longest
    document, or `PACKED_ROW_TOKENS`, and packed rows are cut like plain ones.

    Args:
        rows: Row numbers; may repeat.
        lengths: Tokens of each row of the whole set, by row number.
        token_budget: Padded tokens of a micro-batch; a longer document is a micro-batch of its own.
        one_row: Whether a micro-batch is one row.
        at_once: Micro-batches that run at the same time in a process.
        ranks: Processes that share them.
        cost_tokens: What starting a micro-batch costs.
    """
    if not rows:
        return []
    longest = max(int(lengths[row]) for row in rows)
    plain = cut_step(rows, lengths, token_budget, at_once, ranks, cost_tokens)
    cuts = [[[[row] for row in part] for part in plain]]
    for budget in rank_budgets(token_budget, ranks):
        packed = pack_rows(rows, lengths, budget if one_row else min(budget, max(longest, PACKED_ROW_TOKENS)))
        totals = [sum(int(lengths[row]) for row in documents) for documents in packed]
        parts = cut_step(range(len(packed)), totals, budget, at_once, cost_tokens=cost_tokens)
        cuts.append([[packed[number] for number in part] for part in parts])
    workers = at_once * ranks
    return min(cuts, key=lambda cut: span_tokens([padded_tokens(part, lengths) for part in cut], workers, cost_tokens))


def padded_tokens(part: MicroBatch, lengths: Sequence[int]) -> int:
    """Tokens of a micro-batch, padding included."""
    return len(part) * max(sum(int(lengths[row]) for row in documents) for documents in part)


@dataclass(frozen=True, slots=True)
class Cutter:
    """Cuts steps into micro-batches and builds their batches, as the recipe and the attention want them.

    Attributes:
        examples: The rows.
        task: Makes batches of them.
        pad_id: Fills up short rows.
        packing: Whether several documents may share a row; None: under attention that is made for it.
        attention: Attention implementation of the model.
        at_once: Micro-batches that run at the same time in a process.
        ranks: Processes that share a step's micro-batches.
        cost_tokens: What starting a micro-batch costs.
    """

    examples: Examples
    task: TrainedTask
    pad_id: int
    packing: bool | None = False
    attention: str = "sdpa"
    at_once: int = 1
    ranks: int = 1
    cost_tokens: int = MICRO_BATCH_COST_TOKENS

    @property
    def packs(self) -> bool:
        """Whether several documents may share a row under this attention."""
        return packs(self.packing, self.attention)

    @property
    def one_row(self) -> bool:
        """Whether a packed micro-batch is one row."""
        return self.packs and self.attention in VARIABLE_LENGTH_ATTENTION

    def cut(self, rows: Sequence[int], token_budget: int) -> list[MicroBatch]:
        """Micro-batches of a step, the same on every rank; without packing each row holds one document."""
        lengths = self.examples.lengths
        work = {"at_once": self.at_once, "ranks": self.ranks, "cost_tokens": self.cost_tokens}
        if self.packs:
            return cut_packed(rows, lengths, token_budget, one_row=self.one_row, **work)
        return [[[row] for row in part] for part in cut_step(rows, lengths, token_budget, **work)]

    def of_rank(self, cut: Sequence[MicroBatch], rank: int) -> list[MicroBatch]:
        """Those of a step's micro-batches that a rank runs."""
        return [cut[number] for number in deal(self._padded(cut), self.ranks, self.cost_tokens)[rank]]

    def span_tokens(self, cut: Sequence[MicroBatch]) -> int:
        """See `lorafit.data.batch.span_tokens`."""
        return span_tokens(self._padded(cut), self.at_once * self.ranks, self.cost_tokens)

    def _padded(self, cut: Sequence[MicroBatch]) -> list[int]:
        return [padded_tokens(part, self.examples.lengths) for part in cut]

    def collate(self, part: MicroBatch) -> Batch:
        """The batch of one micro-batch, on the CPU."""
        return self.task.collate([[self.examples[row] for row in documents] for documents in part], self.pad_id)
