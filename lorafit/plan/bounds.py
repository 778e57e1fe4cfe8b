"""How far memory leaves micro-batch and checkpointing open before anything is run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorafit.facts import DeviceFacts
from lorafit.memory import MemoryEstimate, StepMemory, fits
from lorafit.ops.recomputed_layers import CHECKPOINTING, Checkpointing
from lorafit.plan.recipe_step import HEADROOM

MOST_MICRO_BATCH_TOKENS = 16_384
"""Beyond this a forward pass gains no speed on any card: its products are large enough. The run picks below
it."""


@dataclass(frozen=True)
class Bounds:
    """How far memory leaves micro-batch and checkpointing open, and what the ends need.

    Attributes:
        checkpointing: None: several of its values can fit.
        memory: Of the smallest micro-batch.
        memory_least: Of one longest row with checkpointing.
        memory_at_most: Of the largest micro-batch.
        fits: Whether one longest row does, with checkpointing.
    """

    checkpointing: Checkpointing | None
    least_tokens: int
    most_tokens: int
    memory: MemoryEstimate
    memory_least: MemoryEstimate
    memory_at_most: MemoryEstimate
    fits: bool


def memory_bounds(memory: StepMemory, step_rows: int, device: DeviceFacts) -> Bounds:
    """Token budget and checkpointing, as far as memory alone decides them."""
    longest, have, asked = memory.step.row_tokens, device.memory_bytes, memory.checkpointing
    least = memory.at(longest, memory.step.adapter.no_checkpointing is None)
    can_fit = _can_fit(least, device)
    if memory.tokens is not None:
        found, _ = memory.settle(device, HEADROOM)
        settled = _settled(asked, found.gradient_checkpointing, is_ample=True)
        return Bounds(settled, memory.least_tokens, memory.least_tokens, found, least, found, can_fit)
    most = max(longest, min(MOST_MICRO_BATCH_TOKENS, math.ceil(step_rows / device.count) * longest))
    choices: list[Checkpointing] = list(CHECKPOINTING) if asked is None else [asked]
    fitting: dict[Checkpointing, int] = {}
    for choice in choices:
        tokens = memory.largest_tokens(choice, most, have, HEADROOM)
        fitting |= {} if tokens is None else {choice: tokens}
        if tokens == most:
            break
    first = next(iter(fitting), choices[-1])
    settled = _settled(asked, first, is_ample=fitting.get(first) == most)
    largest = max(fitting.values(), default=longest)
    at_most = memory.at(largest, choices[-1] if settled is None else settled)
    return Bounds(settled, longest, largest, memory.at(longest, first), least, at_most, can_fit)


def _settled(asked: Checkpointing | None, least: Checkpointing, *, is_ample: bool) -> Checkpointing | None:
    """What is known of checkpointing before anything is run: what was asked, all layers where less never fits, none
    where memory is ample."""
    is_open = asked is None and least is not True and not (least is False and is_ample)
    return None if is_open else least


def _can_fit(least: MemoryEstimate, device: DeviceFacts) -> bool:
    """The refusal errs on the user's side: what a paged optimizer can move out does not count."""
    paged = least.paged_bytes / least.tensor_bytes
    return fits(least, round(device.memory_bytes / max(1.0 - paged, 1e-9)), HEADROOM)
