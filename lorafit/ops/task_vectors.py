"""Several updates of one weight made one, value by value: TIES and DARE.

    TIES    trim    of each update the largest share of its values stays, the others become 0
            elect   each value's sign is that of the sum over the updates
            merge   the mean of those that are not 0 and have that sign
    DARE    each value of each update is dropped with probability 1 - density, the others divided by density; then all
            are summed

Sources: Yadav et al. 2023, TIES-Merging (https://arxiv.org/abs/2306.01708), algorithm 1; Yu et al. 2023, DARE
(https://arxiv.org/abs/2311.03099), equation 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def ties(updates: Sequence[torch.Tensor], density: float) -> torch.Tensor:
    """Trimmed, elected and merged.

    Args:
        updates: Of one shape, each times its weight.
        density: Share of its values that each keeps.
    """
    trimmed = [_largest(update, density) for update in updates]
    total = torch.stack(trimmed).sum(dim=0)
    elected = torch.where(total >= 0, 1.0, -1.0).to(total.dtype)
    merged, count = torch.zeros_like(total), torch.zeros_like(total)
    for update in trimmed:
        agrees = update.sign() == elected
        merged += update * agrees
        count += agrees
    return merged / count.clamp(min=1)


def dare(updates: Sequence[torch.Tensor], density: float, seeds: Sequence[str]) -> torch.Tensor:
    """The sum of what is left of each.

    Args:
        updates: Of one shape, each times its weight.
        density: Share of its values that each keeps, by the draw.
        seeds: What decides each one's draw.
    """
    total = torch.zeros_like(updates[0])
    for update, seed in zip(updates, seeds, strict=True):
        number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1
        draw = torch.rand(update.shape, generator=torch.Generator().manual_seed(number))
        total += update * (draw < density) / density
    return total


def _largest(update: torch.Tensor, density: float) -> torch.Tensor:
    """The update with all but the largest share of its values at 0."""
    values = update.flatten()
    kept = torch.topk(values.abs(), int(density * values.numel())).indices
    return torch.zeros_like(values).scatter_(0, kept, values[kept]).view_as(update)
