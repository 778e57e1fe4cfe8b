"""A drawn from a normal distribution, and B zero.

    A ~ N(0, 1 / r^2)        B = 0

Source: Hu et al. 2021, LoRA (https://arxiv.org/abs/2106.09685), section 4.1; the deviation is PEFT's, as diffusers
trains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from lorafit.kinds.initialisations import Initialisation, InitialisationSection, Start, initialisations
from lorafit.kinds.initialisations._layers import fresh_layers

if TYPE_CHECKING:
    from peft import PeftModel


class GaussianSection(InitialisationSection):
    """A drawn normally, B zero."""

    kind: Literal["gaussian"] = "gaussian"
    """Normal, of deviation 1 / r."""


@initialisations.register(GaussianSection)
class Gaussian(Initialisation[GaussianSection]):
    """PEFT's."""

    starts_as_base: ClassVar[bool] = True

    def start(self, model: PeftModel, start: Start) -> str | None:
        """Draws every A."""
        for layer in fresh_layers(model):
            layer.peft.reset_lora_parameters(layer.name, "gaussian")
        return None
