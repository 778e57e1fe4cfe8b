"""DyLoRA: one LoRA that is good at every rank. Each step draws a rank b, and only the first b rows and columns compute.

    h = W x + (alpha / b) B[:, :b] A[:b] x        b drawn from r_min .. r, the same for a whole step

What is saved is a plain LoRA of rank r; its first b ranks, with the same alpha, are what was trained at b, and what
`lorafit trim` keeps.

Source: Valipour et al. 2022, DyLoRA (https://arxiv.org/abs/2210.07558), section 3 and algorithm 1. The paper draws for
each micro-batch; here all micro-batches of a step share one, so that how a step is cut decides nothing.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from lorafit.kinds.adapters import adapters
from lorafit.kinds.adapters._leading_ranks import LeadingRanks
from lorafit.kinds.adapters._low_rank import LowRank, ProductSection
from lorafit.ops.step_hook import StepHook

if TYPE_CHECKING:
    from peft import PeftModel

    from lorafit.facts import RunFacts


class DyloraSection(ProductSection):
    """Low-rank adapters that may be cut to any smaller rank afterwards."""

    kind: Literal["dylora"] = "dylora"
    """DyLoRA."""
    r_min: int = Field(default=1, ge=1, le=4096)
    """The smallest rank that is trained for."""
    only_last: bool = False
    """Whether a step trains row b of A and column b of B alone, those before them as they are (the paper's frozen mode:
    faster, and a little worse)."""

    @model_validator(mode="after")
    def _r_min_is_a_rank(self) -> DyloraSection:
        if self.r_min > self.r:
            raise ValueError(f"r_min {self.r_min} is more than r {self.r}")
        return self


class DrawnRanks(LeadingRanks):
    """Draws each step's rank, uniformly, by seed and step.

    Args:
        model: See `LeadingRanks`.
        section: The recipe's.
        seed: Likewise.
    """

    def __init__(self, model: PeftModel, section: DyloraSection, seed: int) -> None:
        super().__init__(model, section.r)
        self._section, self._seed = section, seed

    def rank_at(self, step: int) -> int:
        """b."""
        return random.Random(f"{self._seed}/{step}").randint(self._section.r_min, self._section.r)

    def before_step(self, step: int) -> None:
        """The first b ranks compute."""
        rank = self.rank_at(step)
        self.lead(rank, rescaled=True, frozen=rank - 1 if self._section.only_last else 0)


@adapters.register(DyloraSection)
class Dylora(LowRank[DyloraSection]):
    """PEFT's LoRA, trained at ranks that are drawn; evaluated and saved with all of them."""

    starts_as_base: ClassVar[bool] = True
    saved_as: ClassVar[str | None] = "lora"

    def nested_from(self) -> int | None:
        """From the smallest rank that is drawn."""
        return self.section.r_min

    def step_hook(self, model: PeftModel, run: RunFacts) -> StepHook:
        """Draws the rank of each step."""
        return DrawnRanks(model, self.section, run.seed)
