"""Dropout whose random numbers are a thread's own where threads run side by side.

torch's CPU generator is one for all threads: which of them draws first would decide what is dropped. Inside of
`drawing_from` a thread draws from a generator of its own, and a seed gives the same numbers whatever the others do.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_of_thread = threading.local()


@contextlib.contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """`drop` of this thread draws from a CPU generator with that seed."""
    _of_thread.generator = torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        del _of_thread.generator


def draw_seed() -> int:
    """From torch's own CPU generator, whose state a checkpoint keeps."""
    return int(torch.randint(2**62, ()).item())


def drop(x: torch.Tensor, probability: float) -> torch.Tensor:
    """x with each value zeroed at that probability and the rest scaled by 1 / (1 - probability).

    Outside of `drawing_from` it is `torch.nn.functional.dropout`.

    Source: Srivastava et al. 2014, Dropout (https://jmlr.org/papers/v15/srivastava14a.html).
    """
    generator = getattr(_of_thread, "generator", None)
    if generator is None:
        return torch.nn.functional.dropout(x, probability)
    kept = torch.empty_like(x).bernoulli_(1 - probability, generator=generator).div_(1 - probability)
    return x * kept
