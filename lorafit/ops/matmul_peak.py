"""How fast this machine multiplies matrices: what model flops utilisation is a share of."""

from __future__ import annotations

import time

import torch

_SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}


def measure_matmul_peak(device: torch.device | str, dtype: torch.dtype, *, seconds: float = 1.0) -> float:
    """Floating-point operations a second of the fastest square product found in about `seconds`, threads as they are.

    Each side gets its share of the time and at least two runs, the first of which is not counted.
    """
    sides = _SIDES[torch.device(device).type]
    best = 0.0
    for side in sides:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        until = time.perf_counter() + seconds / len(sides)
        _time_product(a, b)
        while True:
            best = max(best, 2.0 * side**3 / _time_product(a, b))
            if time.perf_counter() > until:
                break
    return best


def _time_product(a: torch.Tensor, b: torch.Tensor) -> float:
    """Seconds of one product, the device's queue drained on both sides."""
    wait_for(a.device)
    began = time.perf_counter()
    torch.mm(a, b)
    wait_for(a.device)
    return time.perf_counter() - began


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
