"""`--fit`: how far each of three numbers can go on a card, the others as the recipe has them.

    micro-batch   tokens of one forward, in rows of the recipe's length
    row           tokens of the only row of a micro-batch
    rank          of the adapter, at the recipe's micro-batch

Each is maximal: one more does not fit by the same estimate, or is beyond a bound that the answer names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lorafit.memory import fits
from lorafit.plan.step_memory import MemoryQuestion, find_largest
from lorafit.recipe.schema import LARGEST_COUNT

if TYPE_CHECKING:
    from lorafit.facts import DeviceFacts
    from lorafit.memory import MemoryEstimate

LEAST_ROW_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Largest:
    """One answer.

    Attributes:
        value: The largest that fits; None: not even `least` does.
        least: Where the search began.
        checkpointing: With what `value` was found; the better of both where the recipe leaves it open.
        other: The largest with the opposite, where the recipe leaves it open and it fits at all.
        bound: What stopped the search where memory did not, e.g. `the model's 8,192 positions`; else empty.
    """

    value: int | None
    least: int
    checkpointing: bool
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

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "gpu": {"name": self.device.name, "memory_bytes": self.device.memory_bytes},
            "headroom": self.headroom,
            "row_tokens": self.row_tokens,
            "micro_batch_tokens": asdict(self.micro_batch),
            "longest_row_tokens": asdict(self.row),
            "rank": None if self.rank is None else asdict(self.rank),
        }


def find_fit(question: MemoryQuestion, micro_batch_tokens: int, device: DeviceFacts, headroom: float) -> Fit:
    """The largest micro-batch, row and rank of a recipe on a card.

    Args:
        question: The recipe on this kind of device.
        micro_batch_tokens: Of the recipe, or one longest row where it says auto.
        device: The card.
        headroom: Share of its memory that stays free.
    """
    asked = question.recipe.training.gradient_checkpointing

    def search(estimate: Callable[[int, bool], MemoryEstimate], least: int, most: int, bound: str) -> Largest:
        def largest(checkpointing: bool) -> int | None:
            return find_largest(
                lambda value: fits(estimate(value, checkpointing), device.memory_bytes, headroom), least, most
            )

        found = {choice: largest(choice) for choice in ([False, True] if asked == "auto" else [bool(asked)])}
        best = max(found, key=lambda choice: found[choice] or 0)  # off where both are equal: it is faster
        value = found[best]
        return Largest(value, least, best, found.get(not best), bound if value == most else "")

    positions = question.shape.max_positions
    rank_bound = _rank_bound(question)
    return Fit(
        device=device,
        headroom=headroom,
        row_tokens=question.longest_tokens,
        micro_batch_tokens=micro_batch_tokens,
        micro_batch=search(
            question.at, question.longest_tokens, LARGEST_COUNT, f"the recipe's bound of {LARGEST_COUNT:,}"
        ),
        row=search(
            lambda tokens, checkpointing: row_question(question, tokens).at(tokens, checkpointing),
            min(LEAST_ROW_TOKENS, positions),
            min(positions, LARGEST_COUNT),
            f"the model's {positions:,} positions",
        ),
        rank=None
        if rank_bound is None
        else search(
            lambda rank, checkpointing: rank_question(question, rank).at(micro_batch_tokens, checkpointing),
            1,
            rank_bound,
            f"the recipe's bound of {rank_bound:,}",
        ),
    )


def row_question(question: MemoryQuestion, tokens: int) -> MemoryQuestion:
    """The same recipe with rows of another length, every token of them trained."""
    return replace(question, longest_tokens=tokens, longest_trained_tokens=tokens)


def rank_question(question: MemoryQuestion, rank: int) -> MemoryQuestion:
    """The same recipe with another rank."""
    adapter = question.recipe.adapter.model_copy(update={"r": rank})
    return replace(question, recipe=question.recipe.model_copy(update={"adapter": adapter}))


def _rank_bound(question: MemoryQuestion) -> int | None:
    """The largest rank that the recipe's schema takes; None where the adapter has none."""
    field = type(question.recipe.adapter).model_fields.get("r")
    bounds = [getattr(rule, "le", None) for rule in field.metadata] if field is not None else []
    return next((int(bound) for bound in bounds if bound is not None), None)
