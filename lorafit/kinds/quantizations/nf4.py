"""NF4: four bits a weight, with codes at the quantiles of a normal distribution.

Source: Dettmers et al. 2023, QLoRA (https://arxiv.org/abs/2305.14314), section 3 and equation 5.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from lorafit.kinds.quantizations import quantizations
from lorafit.kinds.quantizations._four_bit import FourBit, FourBitSection


class Nf4Section(FourBitSection):
    """Frozen linear weights in 4-bit NormalFloat."""

    kind: Literal["nf4"] = "nf4"
    """4-bit NormalFloat (QLoRA)."""


@quantizations.register(Nf4Section)
class Nf4(FourBit[Nf4Section]):
    """bitsandbytes' Linear4bit with the NF4 code."""

    code: ClassVar[str] = "nf4"
