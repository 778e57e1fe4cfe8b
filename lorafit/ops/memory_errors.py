"""Telling an out-of-memory from other errors."""

from __future__ import annotations

import torch

_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "alloc_cpu")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host ran out of memory; torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)
