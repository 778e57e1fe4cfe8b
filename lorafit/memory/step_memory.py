"""`StepMemory`: the one way in which memory is asked for, whichever engine answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lorafit.facts import DeviceFacts
from lorafit.memory.closed_form import closed_form
from lorafit.memory.peak import MADE_BY_STEPS, MemoryEstimate, Phase, fits
from lorafit.memory.step_shape import StepShape
from lorafit.ops.recomputed_layers import Checkpointing, more_than

Engine = Callable[[StepShape, int, Checkpointing], MemoryEstimate]
"""Peak memory of a step by micro-batch tokens and checkpointing: the closed form, or what dry runs measured."""


@dataclass(frozen=True)
class StepMemory:
    """Peak memory of one training step, by micro-batch and checkpointing.

    Attributes:
        step: The model, the kinds and the rows.
        engine: What answers.
        tokens: Padded tokens of a micro-batch as they are asked for; None: left open, and one longest row wherever a
            number is needed.
        checkpointing: None: left open, and of as few layers as memory allows.
    """

    step: StepShape
    engine: Engine = closed_form
    tokens: int | None = None
    checkpointing: Checkpointing | None = None

    @property
    def least_tokens(self) -> int:
        """The micro-batch that is asked for; one longest row at least."""
        return max(self.tokens or 0, self.step.row_tokens)

    def at(self, tokens: int, checkpointing: Checkpointing) -> MemoryEstimate:
        """The estimate for a micro-batch of so many padded tokens, one longest row at least."""
        return with_start(self.step, self.engine(self.step, max(tokens, self.step.row_tokens), checkpointing))

    def settle(self, device: DeviceFacts | None, headroom: float) -> tuple[MemoryEstimate, MemoryEstimate | None]:
        """What the step needs; and what it would without checkpointing, where the device has that turned on.

        Left open, it is of as few layers as fit; of all where nothing does.
        """
        if self.checkpointing is not None:
            return self.at(self.least_tokens, self.checkpointing), None
        plain = found = self.at(self.least_tokens, False)
        for checkpointing in more_than(False):
            if device is None or fits(found, device.memory_bytes, headroom):
                break
            found = self.at(self.least_tokens, checkpointing)
        return found, None if found is plain else plain

    def changed(self, **changes: Any) -> StepMemory:
        """The same of a step in which something is otherwise."""
        return replace(self, step=replace(self.step, **changes))

    def largest_tokens(
        self, checkpointing: Checkpointing, most_tokens: int, device_bytes: int, headroom: float
    ) -> int | None:
        """The most tokens, from one longest row up to `most_tokens`, that fit; None where not even that row does.

        Maximal: one token more does not fit by the same estimate, or is more than `most_tokens`.
        """
        return find_largest(
            lambda tokens: self.at(tokens, checkpointing).needed_bytes,
            device_bytes * (1.0 - headroom),
            self.step.row_tokens,
            max(most_tokens, self.step.row_tokens),
        )


def with_start(step: StepShape, found: MemoryEstimate) -> MemoryEstimate:
    """The estimate of a step; its peak is before it where the adapter's first values take more than any part of it."""
    later = sum(found.fixed.get(name, 0) for name in MADE_BY_STEPS)
    begins = Phase("start", "", {"workspace": step.start_bytes - later})
    more = begins.total_bytes > found.peak_phase.total_bytes
    return replace(found, phases=(begins, *found.phases)) if more else found


def find_largest(needed_bytes: Callable[[int], int], limit_bytes: float, least: int, most: int) -> int | None:
    """The largest of `least` to `most` whose need is within the limit; None where not even that of `least` is.

    Maximal whatever the shape of the need: that of the next value was seen to be more, or it is beyond `most`. What is
    needed grows about linearly, so a straight line between both ends finds the place in a few looks; halving sees to it
    that the worst case takes no more than twice those of a plain bisection.
    """
    low_bytes, high_bytes = needed_bytes(least), needed_bytes(most)
    if low_bytes > limit_bytes:
        return None
    if high_bytes <= limit_bytes:
        return most
    low, high, halves = least, most, False
    while high - low > 1:
        share = 0.5 if halves else (limit_bytes - low_bytes) / (high_bytes - low_bytes)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        before, found_bytes = high - low, needed_bytes(middle)
        if found_bytes <= limit_bytes:
            low, low_bytes = middle, found_bytes
        else:
            high, high_bytes = middle, found_bytes
        halves = high - low > before // 2 and not halves
    return low
