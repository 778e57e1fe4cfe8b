"""State of every random number generator that a run draws from: python, numpy, torch on the CPU and on CUDA devices."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy
import torch

from lorafit.contracts import JsonObject

RngState = JsonObject
"""JSON-able: `python`, `numpy`, `torch` (hex), `cuda` (hex, one a device)."""


def seed_rng(seed: int) -> None:
    """Seeds all of them."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # CUDA too


def capture_rng() -> RngState:
    """The state of all of them. Waits for no device: CUDA's generators live on the host."""
    name, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [name, numpy.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": _to_hex(torch.get_rng_state()),
        "cuda": [_to_hex(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def restore_rng(state: RngState) -> None:
    """Takes all of them back to what `capture_rng` saw."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = state["numpy"]
    numpy.random.set_state((name, numpy.asarray(keys, dtype=numpy.uint32), position, has_gauss, gauss))
    torch.set_rng_state(_from_hex(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        for device, saved in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(_from_hex(saved), device)


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever is drawn inside was never drawn: evaluation and rehearsal leave the training as it was."""
    state = capture_rng()
    try:
        yield
    finally:
        restore_rng(state)


def _to_hex(state: torch.Tensor) -> str:
    return bytes(state.cpu().numpy().tobytes()).hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).clone()
