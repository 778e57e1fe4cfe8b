"""Masks that models cannot build by themselves, and what is known of rows before transformers looks for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import cache

import torch

_of_thread = threading.local()


@contextlib.contextmanager
def known_documents(*, one_a_row: bool) -> Iterator[None]:
    """Spares a device transformers' look for packed documents: whether rows hold several is known.

    Each forward looks at the positions, for which the host waits until the device has done all that it was given. A
    CPU, where nothing waits, is spared it too: what is tested there is what a device does.
    """
    _spare_devices_the_look()
    before = _one_a_row()
    _of_thread.one_a_row = one_a_row
    try:
        yield
    finally:
        _of_thread.one_a_row = before


def _one_a_row() -> bool | None:
    """Whether each row of the forward that runs holds one document; None where nobody said."""
    known: bool | None = getattr(_of_thread, "one_a_row", None)
    return known


def holds_documents() -> bool:
    """Whether rows of the forward that runs are known to hold several documents."""
    return _one_a_row() is False


@cache
def _spare_devices_the_look() -> None:
    from transformers import masking_utils

    look = masking_utils.find_packed_sequence_indices

    def look_if_unknown(position_ids: torch.Tensor) -> torch.Tensor | None:
        known = _one_a_row()
        if known is None:
            found: torch.Tensor | None = look(position_ids)
            return found
        # None: no documents to keep apart
        return None if known else (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)

    masking_utils.find_packed_sequence_indices = look_if_unknown


def block_diagonal_mask(position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Causal attention inside each document of a packed row, as something to add to the scores.

    Additive, since eager attention takes a boolean mask for numbers, which is wrong without a word.

        positions  0 1 2 0 1          0 · · · ·
                                      0 0 · · ·
                                      0 0 0 · ·       · = the least number of the dtype
                                      · · · 0 ·
                                      · · · 0 0

    Args:
        position_ids: [batch, seq]; a document begins wherever they are 0.
        dtype: Of the scores.

    Returns:
        [batch, 1, seq, seq].
    """
    document = (position_ids == 0).cumsum(-1)
    is_seen = (document.unsqueeze(-1) == document.unsqueeze(-2)).tril()
    mask = torch.zeros(is_seen.shape, dtype=dtype, device=position_ids.device)
    return mask.masked_fill_(~is_seen, torch.finfo(dtype).min).unsqueeze(1)


def documents_mask(bounds: torch.Tensor, tokens: int, window: int | None) -> torch.Tensor:
    """What each token of one packed row sees: itself and those before it in its document, `window` of them at most.

    Args:
        bounds: Where documents begin, and the row's end, [documents + 1].
        tokens: Of the row.
        window: None: the whole document.

    Returns:
        bool [1, 1, seq, seq].
    """
    places = torch.arange(tokens, dtype=bounds.dtype, device=bounds.device)
    document = torch.bucketize(places, bounds, right=True)
    is_seen = (document[:, None] == document).tril()
    return (is_seen if window is None else is_seen.triu(1 - window))[None, None]
