"""`--fit`: how far each of three numbers can go on a card, the others as the recipe has them.

    micro-batch   tokens of one forward, in rows of the recipe's length
    row           tokens of the only row of a micro-batch
    rank          of the adapter, at the recipe's micro-batch

Each is maximal: one more does not fit by the same estimate, or is beyond a bound that the answer names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from lorafit.contracts import JsonObject
from lorafit.estimation.ways_to_save import LEAST_ROW_TOKENS
from lorafit.facts import DeviceFacts
from lorafit.kinds.adapters import AdapterSection
from lorafit.memory import MemoryEstimate, StepMemory, find_largest
from lorafit.ops.recomputed_layers import Checkpointing
from lorafit.recipe.schema import LARGEST_COUNT


@dataclass(frozen=True, slots=True)
class Largest:
    """One answer.

    Attributes:
        value: The largest that fits; None: not even `least` does.
        least: Where the search began.
        checkpointing: With what `value` was found; the better of on and off where the recipe leaves it open.
        other: The largest with the opposite, where the recipe leaves it open and it fits at all.
        bound: What stopped the search where memory did not, e.g. `the model's 8,192 positions`; else empty.
    """

    value: int | None
    least: int
    checkpointing: Checkpointing
    other: int | None = None
    bound: str = ""


@dataclass(frozen=True, slots=True)
class Fit:
    """The answers for one card.

    Attributes:
        row_tokens: Length of the rows that micro-batch and rank were asked with.
        rank: None where the adapter has no rank.
    """

    device: DeviceFacts
    headroom: float
    row_tokens: int
    micro_batch_tokens: int
    micro_batch: Largest
    row: Largest
    rank: Largest | None

    @property
    def nothing_fits(self) -> bool:
        """Whether not even the least of any number fits."""
        found = (self.micro_batch, self.row, self.rank)
        return all(answer is None or answer.value is None for answer in found)

    def to_json(self) -> JsonObject:
        """Plain values."""
        return {
            "gpu": {"name": self.device.name, "memory_bytes": self.device.memory_bytes},
            "headroom": self.headroom,
            "row_tokens": self.row_tokens,
            "micro_batch_tokens": asdict(self.micro_batch),
            "longest_row_tokens": asdict(self.row),
            "rank": None if self.rank is None else asdict(self.rank),
        }


def find_fit(asked: StepMemory, device: DeviceFacts, headroom: float) -> Fit:
    """The largest micro-batch, row and rank of a recipe on a card.

    Args:
        asked: The recipe's step on this kind of device.
        device: The card.
        headroom: Share of its memory that stays free.
    """
    step, tokens = asked.step, asked.least_tokens
    limit = device.memory_bytes * (1.0 - headroom)

    def search(estimate: Callable[[int, Checkpointing], MemoryEstimate], least: int, most: int, bound: str) -> Largest:
        def largest(checkpointing: Checkpointing) -> int | None:
            return find_largest(lambda value: estimate(value, checkpointing).needed_bytes, limit, least, most)

        choices: tuple[Checkpointing, ...] = (False, True) if asked.checkpointing is None else (asked.checkpointing,)
        found = {choice: largest(choice) for choice in choices}
        best = max(found, key=lambda choice: found[choice] or 0)  # off where both are equal: it is faster
        value = found[best]
        return Largest(value, least, best, found.get(not best), bound if value == most else "")

    def of_row(sequence_tokens: int, checkpointing: Checkpointing) -> MemoryEstimate:
        row_tokens, labels = step.task.assumed_row(sequence_tokens)
        return asked.changed(row_tokens=row_tokens, row_labels=labels).at(row_tokens, checkpointing)

    def of_rank(rank: int, checkpointing: Checkpointing) -> MemoryEstimate:
        return asked.changed(adapter=step.adapter_with(r=rank)).at(tokens, checkpointing)

    positions, most_rank = step.model.max_positions, _rank_bound(step.adapter.section)
    most_tokens = f"the recipe's bound of {LARGEST_COUNT:,}"
    least_row, most_row = min(LEAST_ROW_TOKENS, positions), min(positions, LARGEST_COUNT)
    return Fit(
        device=device,
        headroom=headroom,
        row_tokens=step.row_tokens,
        micro_batch_tokens=tokens,
        micro_batch=search(asked.at, step.row_tokens, LARGEST_COUNT, most_tokens),
        row=search(of_row, least_row, most_row, f"the model's {positions:,} positions"),
        rank=search(of_rank, 1, most_rank, f"the recipe's bound of {most_rank:,}") if most_rank else None,
    )


def _rank_bound(section: AdapterSection) -> int | None:
    """The largest rank that the recipe's schema takes; None where the adapter has none."""
    field = type(section).model_fields.get("r")
    bounds = [getattr(rule, "le", None) for rule in field.metadata] if field is not None else []
    return next((int(bound) for bound in bounds if bound is not None), None)
