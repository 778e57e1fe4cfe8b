"""Dropout that is cheap on a CPU, and whose random numbers are a thread's own where threads run side by side.

torch draws a number of 64 bits a value on a CPU, one thread at a time, from one generator for all threads: which of
them draws first would decide what is dropped. Here a value takes 16 bits, and inside of `drawing_from` a thread draws
from a generator of its own: a seed gives the same numbers whatever the others do.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy
import torch

_BITS = 16
_of_thread = threading.local()


@contextlib.contextmanager
def drawing_from(seed: int) -> Iterator[numpy.random.Generator]:
    """`drop` of this thread draws from a CPU generator with that seed, which is given."""
    _of_thread.generator = _generator(seed)
    try:
        yield _of_thread.generator
    finally:
        del _of_thread.generator


def draw_seed() -> int:
    """From torch's own CPU generator, whose state a checkpoint keeps."""
    return int(torch.randint(2**62, ()).item())


def drop(x: torch.Tensor, probability: float) -> torch.Tensor:
    """x with each value zeroed at that probability and the rest scaled by 1 / (1 - probability).

    On a GPU it is `torch.nn.functional.dropout`. On a CPU the probability is rounded to a multiple of 2^-16; outside
    of `drawing_from` each call takes a seed from torch's generator, so that a recomputed forward drops the same values.

    Args:
        x: Of a floating-point dtype.
        probability: At least 0, under 1.

    Source: Srivastava et al. 2014, Dropout (https://jmlr.org/papers/v15/srivastava14a.html).
    """
    if x.device.type != "cpu":
        return torch.nn.functional.dropout(x, probability)
    return x * draw_kept(x, probability)


def draw_kept(x: torch.Tensor, probability: float) -> torch.Tensor:
    """What `drop` multiplies by: zeros and 1 / (1 - probability), in the shape and dtype of x."""
    generator = getattr(_of_thread, "generator", None) or _generator(draw_seed())
    words = generator.integers(2**64, size=-(-x.numel() * _BITS // 64), dtype=numpy.uint64)
    drawn = torch.from_numpy(words.view(numpy.int16))[: x.numel()].view(x.shape)
    dropped = min(round(probability * 2**_BITS), 2**_BITS - 1)
    kept = torch.empty_like(drawn, dtype=x.dtype)
    torch.ge(drawn, dropped - 2 ** (_BITS - 1), out=kept)
    return kept.mul_(2**_BITS / (2**_BITS - dropped))


def draw_uniform(x: torch.Tensor) -> torch.Tensor:
    """fp32 numbers from -1 to 1 in the shape and on the device of x; on a CPU drawn as those of `drop`."""
    if x.device.type != "cpu":
        return torch.empty(x.shape, device=x.device).uniform_(-1.0, 1.0)
    generator = getattr(_of_thread, "generator", None) or _generator(draw_seed())
    return torch.from_numpy(generator.random(tuple(x.shape), dtype=numpy.float32)).mul_(2.0).sub_(1.0)


def _generator(seed: int) -> numpy.random.Generator:
    return numpy.random.Generator(numpy.random.SFC64(seed))
