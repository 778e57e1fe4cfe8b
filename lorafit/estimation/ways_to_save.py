"""What would make a recipe need less on a card: each switch alone, and the cheapest set with which it fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations
from typing import TYPE_CHECKING

from lorafit.estimation.switches import LEAST_ROW_TOKENS, Switch, shorter_rows, switches
from lorafit.memory import covers, find_largest, fits
from lorafit.memory.peak import ALLOCATOR_FACTOR

if TYPE_CHECKING:
    from lorafit.facts import DeviceFacts
    from lorafit.memory import StepMemory

MOST_SWITCHES = 3


@dataclass(frozen=True, slots=True)
class Saving:
    """What one switch would save.

    Attributes:
        switch: As a line of the recipe.
        fits: Whether the recipe would fit with it; None: no card was named.
        note: When the saving is not certain, why.
    """

    switch: str
    saved_bytes: int
    fits: bool | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Enough:
    """A set of switches with which the recipe fits.

    Attributes:
        flags: `--set KEY=VALUE`, each.
        needed_bytes: What it needs with all of them.
    """

    flags: tuple[str, ...]
    needed_bytes: int

    @property
    def shown(self) -> str:
        """To be pasted."""
        return " ".join(self.flags)


def find_savings(
    now: StepMemory, checkpointing: bool, device: DeviceFacts | None, headroom: float
) -> tuple[Saving, ...]:
    """The switches that save something, the largest saving first."""
    needed, found = now.at(now.least_tokens, checkpointing).needed_bytes, []
    half = now.step.sequence_tokens // 2
    shorter = [shorter_rows(half)] if half >= LEAST_ROW_TOKENS else []
    for switch in (*switches(now, checkpointing), *shorter):
        changed = switch.on(replace(now, checkpointing=checkpointing))
        memory, _ = changed.settle(None, headroom)
        left = round(memory.paged_bytes * ALLOCATOR_FACTOR[memory.device_kind]) if switch.note else 0
        saved = needed - memory.needed_bytes + left
        if saved > 0:
            enough = None if device is None else fits(memory, device.memory_bytes, headroom)
            found.append(Saving(switch.line, saved, enough, switch.note))
    return tuple(sorted(found, key=lambda saving: -saving.saved_bytes))


def find_enough(now: StepMemory, checkpointing: bool, device: DeviceFacts, headroom: float) -> Enough | None:
    """The cheapest set of at most three switches with which a recipe fits that does not; None where there is none.

    Where no set is enough, the switches that save most are tried, one by one, with the longest rows that fit then.
    Where each estimate is a dry run, sets of which the switches alone would not save enough together are not tried.

    Args:
        now: The recipe's step.
        checkpointing: Whether layers are checkpointed as things are.
        device: The card.
        headroom: Share of its memory that stays free.
    """
    limit = device.memory_bytes * (1.0 - headroom)

    def needs(chosen: tuple[Switch, ...]) -> int:
        return _with(now, chosen).settle(device, headroom)[0].needed_bytes

    possible = [switch for switch in switches(now, checkpointing) if switch.price is not None]
    needed = needs(())
    saved = {switch.flag: needed - needs((switch,)) for switch in possible}
    sets = sorted(_sets(possible), key=lambda chosen: (sum(one.price or 0 for one in chosen), len(chosen)))
    for chosen in sets:
        if not covers(now.step) and sum(saved[one.flag] for one in chosen) < needed - limit:
            continue
        if needs(chosen) <= limit:
            return Enough(tuple(one.flag for one in chosen), needs(chosen))
    best: tuple[int, tuple[Switch, ...]] | None = None
    others: tuple[Switch, ...] = ()
    while True:

        def needs_at(tokens: int, others: tuple[Switch, ...] = others) -> int:
            return needs((*others, shorter_rows(tokens)))

        longest = find_largest(needs_at, limit, LEAST_ROW_TOKENS, now.step.sequence_tokens)
        if longest is not None and (best is None or longest > best[0]):
            best = longest, (*others, shorter_rows(longest))
        left = [one for one in possible if one.key not in {other.key for other in others}]
        if len(others) == MOST_SWITCHES - 1 or not left:
            return best and Enough(tuple(one.flag for one in best[1]), needs(best[1]))
        others = min(((*others, one) for one in left), key=needs)


def _sets(possible: list[Switch]) -> Iterator[tuple[Switch, ...]]:
    """Every set of up to `MOST_SWITCHES`, of which no two say the same key."""
    for size in range(1, MOST_SWITCHES + 1):
        for chosen in combinations(possible, size):
            if len({one.key for one in chosen}) == size:
                yield chosen


def _with(now: StepMemory, chosen: tuple[Switch, ...]) -> StepMemory:
    return reduce(lambda asked, switch: switch.on(asked), chosen, now)
