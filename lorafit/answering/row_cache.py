"""Keys and values of rows of different lengths, which join and leave without a copy of the others.

row 0  [k k k k k k + . . .]      k: a token read or written    +: where the next one goes    .: free, and zero
row 1  [k k k + . . . . . .]      right padding: a row's tokens stand at its own positions, and no row moves
row 2  [k k k k k + . . . .]      where another one joins; the mask hides what lies behind each row's end
        └── columns ──┘
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

_SPARE_COLUMNS = 128


class RowCache(Cache):  # type: ignore[misc]
    """The cache of several rows, as a model's forward takes it for one new token of each.

    Attributes:
        lengths: Tokens of each row.
    """

    def __init__(self, layer_count: int) -> None:
        super().__init__(layers=[_RowLayer(self) for _ in range(layer_count)])
        self.lengths: list[int] = []
        self.places = torch.empty(0, dtype=torch.long)

    @property
    def columns(self) -> int:
        """Columns that a forward sees: those of the longest row, with its new token."""
        return max(self.lengths, default=0) + 1

    def place(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes room for one token of each row; its positions `[rows, 1]` and the mask `[rows, columns]`."""
        self._reserve(len(self.lengths), self.columns)
        self.places = torch.tensor(self.lengths, device=device)
        mask = torch.arange(self.columns, device=device) <= self.places[:, None]
        return self.places[:, None], mask.long()

    def advance(self) -> None:
        """Keeps what the forward has written."""
        self.lengths = [length + 1 for length in self.lengths]

    def add(self, cache: Cache) -> None:
        """Adds a row, whose own cache `is_plain`."""
        length, row = int(cache.get_seq_length()), len(self.lengths)
        self._reserve(row + 1, max(self.columns, length + 1), like=cache)
        for layer, own in zip(self.layers, cache.layers, strict=True):
            layer.keys[row, :, :length] = own.keys[0]
            layer.values[row, :, :length] = own.values[0]
        self.lengths.append(length)

    def drop(self, row: int) -> None:
        """Takes a row out; the last one moves into its place."""
        last = len(self.lengths) - 1
        for layer in self.layers:
            for kept in (layer.keys, layer.values):
                kept[row] = kept[last]
                kept[last] = 0  # a value that is no number would reach whoever comes next, mask or not
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths:
            for layer in self.layers:
                layer.keys = layer.values = None

    def _reserve(self, rows: int, columns: int, like: Cache | None = None) -> None:
        """Makes room; all layers get theirs, or none does."""
        first = self.layers[0].keys
        if first is not None and first.shape[0] >= rows and first.shape[2] >= columns:
            return
        size, used = (1 << (rows - 1).bit_length(), columns + _SPARE_COLUMNS), (len(self.lengths), self.columns - 1)
        sources = self.layers if like is None else like.layers
        made = [
            (_widened(own.keys, source.keys, size, used), _widened(own.values, source.values, size, used))
            for own, source in zip(self.layers, sources, strict=True)
        ]
        for layer, (keys, values) in zip(self.layers, made, strict=True):
            layer.keys, layer.values, layer.is_initialized = keys, values, True


class _RowLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's part: `[rows, heads, columns, width]`, of which the first rows and columns are in use."""

    def __init__(self, whole: RowCache) -> None:
        super().__init__()
        self._whole = whole

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts each row's new token, `[rows, heads, 1, width]`, behind its last; gives all that the forward sees."""
        places, columns = self._whole.places, self._whole.columns
        rows = torch.arange(len(places), device=places.device)
        self.keys[rows, :, places] = key_states[:, :, 0]
        self.values[rows, :, places] = value_states[:, :, 0]
        return self.keys[: len(rows), :, :columns], self.values[: len(rows), :, :columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._whole.columns, 0

    def get_seq_length(self) -> int:
        return self._whole.columns - 1

    def get_max_length(self) -> int:
        return -1


def is_plain(cache: object) -> bool:
    """Whether a row's own cache is keys and values of every token in every layer, and nothing else."""
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers)


def _widened(
    kept: torch.Tensor | None, like: torch.Tensor, size: tuple[int, int], used: tuple[int, int]
) -> torch.Tensor:
    """Zeros of so many rows and columns, with those that are in use."""
    (rows, columns), (rows_used, columns_used) = size, used
    made = like.new_zeros(rows, like.shape[1], columns, like.shape[3])
    if kept is not None:
        made[:rows_used, :, :columns_used] = kept[:rows_used, :, :columns_used]
    return made
