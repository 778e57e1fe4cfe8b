"""Giving memory that was freed back to the system."""

from __future__ import annotations

import ctypes
import sys


def trim_heap() -> None:
    """Returns free pages of the C library's heap, whose arenas keep what was freed between blocks still in use.

    Source: malloc_trim(3) of the GNU C library; other allocators are left to themselves.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
