"""Triton's interpreter, taught what Liger's kernels ask of a compiler: they then run on a CPU's tensors, slowly.

The interpreter runs a kernel as Python. It lacks two things that the compiler has: a float among a kernel's arguments
is an fp32 tensor to the compiler, and `libdevice` is a library of a card. bf16 is left out: its sums are wrong there.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

PACKAGES = ("triton", "liger_kernel")


def why_not() -> str:
    """Why kernels cannot be interpreted in this process; empty where they can."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        return f"{' and '.join(missing)} are not installed: make test-liger"
    return "" if os.environ.get("TRITON_INTERPRET") == "1" else "TRITON_INTERPRET is not 1: make test-liger"


def teach() -> None:
    """Adds what is lacking, for the process. Before Liger is imported, which takes `rsqrt` with it."""
    import numpy as np
    from triton import language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_floats(value: Any) -> Any:
        if not isinstance(value, float):
            return convert(value)
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = convert_floats
    libdevice.rsqrt = lambda x: tl.rsqrt(x)  # looked up when it is called: the interpreter puts its own in place then
