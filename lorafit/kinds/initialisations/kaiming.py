"""A drawn uniformly, as torch draws a linear's weight, and B zero.

    A ~ U(-1 / sqrt(in), 1 / sqrt(in))        B = 0

Source: Hu et al. 2021, LoRA (https://arxiv.org/abs/2106.09685), in the authors' code: Kaiming's with a = sqrt(5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from lorafit.kinds.initialisations import Initialisation, InitialisationSection, Start, initialisations

if TYPE_CHECKING:
    from peft import PeftModel


class KaimingSection(InitialisationSection):
    """A drawn uniformly, B zero."""

    kind: Literal["kaiming"] = "kaiming"
    """LoRA's own."""


@initialisations.register(KaimingSection)
class Kaiming(Initialisation[KaimingSection]):
    """What PEFT has drawn already when it made the layers."""

    starts_as_base: ClassVar[bool] = True

    def start(self, model: PeftModel, start: Start) -> str | None:
        """Leaves them."""
        return None
