"""First values of a low-rank adapter's A and B: asked once, before the first step of a run that begins.

    fresh adapter ──start──> first values of A and B        never on a resume, nor for an adapter that is opened

The base stays as it is, in memory and on disk. A method that takes a part out of its weights to train it has A and B of
twice the rank, whose second halves hold that part with its sign turned (`lorafit.ops.corrected_factor`):

    W + s (B A - B0 A0)        A, B: trained, r wide; A0, B0: what they began with, held

A saved adapter is so a plain LoRA on the original base, whatever it began with.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from lorafit.kinds.registry import Kind, S_co, SectionRegistry
from lorafit.kinds.section import KindSection

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from lorafit.facts import LinearShape


class InitialisationSection(KindSection):
    """What every initialisation's section has."""


class RowsSection(InitialisationSection):
    """The section of a method that looks at what layers get to see."""

    rows: int = Field(default=32, ge=1, le=100_000)
    """How many rows run forward before step 1, one at a time, drawn by the recipe's seed."""


@dataclass(frozen=True)
class Start:
    """What a run that begins can be asked for.

    Attributes:
        forward: Runs rows through the base, one at a time, always the same: a split, how many at most, and by path who
            sees what a linear gets, `[tokens, in]`, padding left out.
        original: A linear's weight `[out, in]` by its path, as the base's files hold it, before it was quantised.
    """

    forward: Callable[[str, int, Mapping[str, Callable[[torch.Tensor], None]]], None]
    original: Callable[[str], torch.Tensor]


class Initialisation(Kind[S_co]):
    """One way to begin.

    Attributes:
        corrects: Whether it begins with a part of the base's weights, which second halves of A and B then take out.
        starts_as_base: Whether the model still computes what its base does, to the last bit.
        usual_rate: The learning rate that it wants, as a multiple of what its adapter wants without.
    """

    corrects: ClassVar[bool] = False
    starts_as_base: ClassVar[bool] = False
    usual_rate: ClassVar[float] = 1.0

    @property
    def reads(self) -> str | None:
        """The split of rows that it runs; None: it needs none."""
        return None

    def refuses(self, quantization_kind: str) -> str | None:
        """Why it cannot begin beside linears stored so, in one sentence; None where it can."""
        return None

    def why_not_rank(self, rank: int, linear: LinearShape) -> str | None:
        """Why a linear's adapter cannot begin so with that rank; None where it can."""
        return None

    def memory_bytes(self, linears: Sequence[LinearShape], rank: int) -> int:
        """The most that is held at once beside the model, for adapters of that rank on those linears."""
        return 0

    def flops(self, linears: Sequence[LinearShape]) -> int:
        """Of all decompositions; 0 where they are nothing beside a step."""
        return 0

    @abstractmethod
    def start(self, model: PeftModel, start: Start) -> str | None:
        """Gives A and B of every layer their first values.

        Args:
            model: Its adapter fresh: A drawn, B zero. Random numbers are the caller's to seed, and to put back.
            start: What the run can be asked for.

        Returns:
            What a user may want to know of it.
        """


initialisations: SectionRegistry[Initialisation[InitialisationSection]] = SectionRegistry(
    "initialisation", "lorafit.kinds.initialisations"
)
