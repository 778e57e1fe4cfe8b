"""Operations of a layer, and the worst moment while they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Moment:
    """Something alive only for a moment: bytes a token, and bytes that do not grow with tokens (a dequantised weight,
    the scores of a block of queries)."""

    phase: str
    token_bytes: float
    fixed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Operation:
    """One step of a layer: what it keeps for the backward pass, and its moments."""

    name: str
    kept: float
    moments: tuple[Moment, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerPeak:
    """The most that one layer holds.

    Attributes:
        kept_bytes: What the whole layer leaves for its backward pass.
        peak_bytes: Kept so far plus the moment, at the worst moment.
        fixed_bytes: The dequantised weight among them, or the scores of a block of queries.
        where: The operation of that moment.
    """

    kept_bytes: int
    peak_bytes: int
    fixed_bytes: int
    where: str


def worst_moment(operations: Sequence[Operation], tokens: int, phase: str) -> LayerPeak:
    """Walks the operations and keeps the worst moment of a phase (`forward` or `backward`)."""
    kept = 0.0
    peak, fixed, where = 0.0, 0, ""
    for operation in operations:
        kept += operation.kept
        for moment in (m for m in operation.moments if m.phase == phase):
            bytes_now = (kept + moment.token_bytes) * tokens + moment.fixed_bytes
            if bytes_now > peak:
                peak, fixed, where = bytes_now, moment.fixed_bytes, operation.name
    return LayerPeak(round(kept * tokens), round(max(peak, kept * tokens)), fixed, where)


def run_beside(operation: Operation, alive: dict[str, int]) -> Operation:
    """The operation while something else is alive, in bytes a token by phase."""
    moments = operation.moments or (Moment("forward", 0.0),)
    return replace(operation, moments=tuple(replace(m, token_bytes=m.token_bytes + alive[m.phase]) for m in moments))
