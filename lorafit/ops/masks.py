"""Masks that models cannot build by themselves."""

from __future__ import annotations

import torch


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
