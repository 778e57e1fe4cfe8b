"""Rows that a forward takes one token further: one by itself, or several that share it.

LiveRow ──reads its prompt alone──> first token ──> SharedRows: one forward for a token of each
                                      └─ where rows cannot share: goes on alone, with its own cache
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from lorafit.answering.choosing import LiveRow, choose_tokens
from lorafit.answering.forwards import forward, forward_rows
from lorafit.answering.row_cache import RowCache, is_plain

if TYPE_CHECKING:
    from lorafit.answering.live_adapters import LiveAdapters

READ_AT_ONCE_TOKENS = 512
"""Most tokens of a prompt in one forward: rows that are being answered wait so long for their next token."""


class LiveBatch(Protocol):
    """Rows that one forward takes further."""

    rows: list[LiveRow]

    def step(self) -> None:
        """Takes each row one token further, or reads more of its prompt."""

    def drop_ended(self) -> None:
        """Takes rows that are over out."""


class LoneRow:
    """One row by itself, with a cache of the model's own making.

    Args:
        adapters: Switch its adapter on.
        row: It.
    """

    def __init__(self, adapters: LiveAdapters, row: LiveRow) -> None:
        self._adapters, self.rows = adapters, [row]
        self.cache: Any = None
        self._read_tokens = 0

    @property
    def reads(self) -> int:
        """How many tokens of its prompt the next step reads; all at once where a cache is more than keys and values."""
        row, shares = self.rows[0], self._adapters.may_share(self.rows[0].ticket.adapter)
        left = len(row.prompt) - self._read_tokens
        return min(left, READ_AT_ONCE_TOKENS) if shares else left

    @property
    def may_share(self) -> bool:
        """Whether its prompt is read, and its cache can stand beside others."""
        row = self.rows[0]
        is_read = bool(row.tokens) and not row.is_over
        return is_read and self._adapters.may_share(row.ticket.adapter) and is_plain(self.cache)

    def step(self) -> None:
        """One forward of the next tokens of the prompt, or of the last one of the answer."""
        row = self.rows[0]
        reads = self.reads
        ids = row.prompt[self._read_tokens :][:reads] if reads else [row.tokens[-1]]
        with self._adapters.using([row.ticket.adapter]):
            logits, self.cache = forward(self._adapters.model, ids, self.cache)
        self._read_tokens += reads
        if not self.reads:
            choose_tokens([row], logits)

    def drop_ended(self) -> None:
        """Takes it out where it is over."""
        self.rows = [row for row in self.rows if not row.is_over]


class SharedRows:
    """Rows whose adapters may be on together, in one forward.

    Args:
        adapters: Switch theirs on.
    """

    def __init__(self, adapters: LiveAdapters) -> None:
        self._adapters = adapters
        self.rows: list[LiveRow] = []
        self._cache: RowCache | None = None

    def join(self, lone: LoneRow) -> None:
        """Takes a row over from where it was alone."""
        if self._cache is None:
            self._cache = RowCache(len(lone.cache.layers))
        self._cache.add(lone.cache)
        self.rows.append(lone.rows[0])

    def step(self) -> None:
        """One forward of the last token of each."""
        assert self._cache is not None, "rows have joined"
        with self._adapters.using([row.ticket.adapter for row in self.rows]):
            logits = forward_rows(self._adapters.model, [row.tokens[-1] for row in self.rows], self._cache)
        self._cache.advance()
        choose_tokens(self.rows, logits)

    def drop_ended(self) -> None:
        """Takes rows that are over out; the last one moves into the place of each."""
        for place in reversed(range(len(self.rows))):
            if self.rows[place].is_over:
                assert self._cache is not None, "rows have joined"
                self._cache.drop(place)
                self.rows[place] = self.rows[-1]
                self.rows = self.rows[:-1]
