"""bitsandbytes' first import, without what it brings along."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import MutableMapping

from lorafit.ops.holding import holding


def import_bitsandbytes() -> None:
    """Imports bitsandbytes without torch's compiler and without the package `kernels`. Call it before anybody else may.

    While it is imported, it wraps four fallback kernels in `torch.compile`, which imports all of the compiler and takes
    about a second; CPUs and CUDA devices have kernels of their own for what those do. And where `kernels` is installed,
    it fetches one more from the hub and runs it: code that nobody named.
    """
    modules: MutableMapping[str, object] = sys.modules  # type: ignore[assignment]
    without_kernels = holding(modules, "kernels", None)  # None: its import fails, as where it is not installed
    with holding(os.environ, "TORCHDYNAMO_DISABLE", "1"), without_kernels, contextlib.suppress(ImportError):
        import bitsandbytes  # noqa: F401 - where it is not installed, that is said by what needs it
