"""FP4: four bits a weight, with the codes of a 4-bit float (sign, two exponent bits, one mantissa bit).

Source: Dettmers et al. 2023, QLoRA (https://arxiv.org/abs/2305.14314), section 4, where it is compared with NF4.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from lorafit.kinds.quantizations import quantizations
from lorafit.kinds.quantizations._four_bit import FourBit, FourBitSection


class Fp4Section(FourBitSection):
    """Frozen linear weights in 4-bit floating point."""

    kind: Literal["fp4"] = "fp4"
    """4-bit float."""


@quantizations.register(Fp4Section)
class Fp4(FourBit[Fp4Section]):
    """bitsandbytes' Linear4bit with the FP4 code."""

    code: ClassVar[str] = "fp4"
