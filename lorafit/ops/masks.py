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
    """Spares a device transformers' look for packed documents where every row is known to hold one.

    Each forward looks at the positions that the model made itself, for which the host waits until the device has done
    all that it was given. A CPU, where nothing waits, is spared it too: what is tested there is what a device does.
    """
    _spare_devices_the_look()
    before = getattr(_of_thread, "one_a_row", False)
    _of_thread.one_a_row = one_a_row
    try:
        yield
    finally:
        _of_thread.one_a_row = before


@cache
def _spare_devices_the_look() -> None:
    from transformers import masking_utils

    look = masking_utils.find_packed_sequence_indices

    def look_if_unknown(position_ids: torch.Tensor) -> torch.Tensor | None:
        is_known = getattr(_of_thread, "one_a_row", False)
        return None if is_known else look(position_ids)  # None: no documents to keep apart

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
