"""Hashes of quantised weights: what a run notes of each, so that a merge can prove it made the same one again."""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SUM_BYTES = 8192
"""Packed bytes whose codes are summed together (see `sum_codes`)."""


def hash_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()


def sum_codes(codes: torch.Tensor, *, packed: bool) -> str:
    """Sums of codes over stretches of SUM_BYTES bytes, modulo 2^16, as base64 of little-endian uint16.

    A hash only says that two sets of codes differ. On another kind of device a code on a rounding edge may come out one
    level off; the difference of these sums says how many did (as long as few do, which is what is allowed).
    """
    import torch

    flat = codes.detach().reshape(-1).view(torch.uint8)
    sums = []
    for start in range(0, flat.numel(), SUM_BYTES * 512):  # 4 MiB at a time
        part = flat[start : start + SUM_BYTES * 512]
        levels = ((part >> 4) + (part & 15)).to(torch.int32) if packed else part.to(torch.int32)
        levels = torch.nn.functional.pad(levels, (0, -levels.numel() % SUM_BYTES))
        sums.append(levels.view(-1, SUM_BYTES).sum(dim=1) % 65536)
    return base64.b64encode(torch.cat(sums).to(torch.uint16).cpu().numpy().astype("<u2").tobytes()).decode("ascii")


def count_differences(ours: str, theirs: str) -> int:
    """Levels by which two sets of codes differ, from their sums: the sum of |difference| over stretches."""
    import numpy as np

    a, b = (np.frombuffer(base64.b64decode(text), dtype="<u2").astype(np.int64) for text in (ours, theirs))
    if a.shape != b.shape:
        return 2**62
    distance = (a - b) % 65536
    return int(np.minimum(distance, 65536 - distance).sum())
