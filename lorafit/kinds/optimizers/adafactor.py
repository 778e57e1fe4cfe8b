"""Adafactor: second moments as an outer product of row and column means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lorafit.contracts import JsonObject
from lorafit.kinds.optimizers import Beta, Optimizer, OptimizerSection, WeightDecay, optimizers

if TYPE_CHECKING:
    import torch

_TYPICAL_RANK = 8  # an [r, in] matrix keeps r + in numbers, about 1/r of its size


class AdafactorSection(OptimizerSection):
    """Adafactor with the recipe's learning rate (no relative step): state of about 1/r of the adapter."""

    kind: Literal["adafactor"] = "adafactor"
    decay_rate: float = Field(default=-0.8, ge=-1.0, lt=0.0)
    """Exponent of the step in the decay of the second moment, 1 - step ** decay_rate (-1 to below 0)."""
    clip_threshold: float = Field(default=1.0, gt=0.0)
    """Root mean square to which an update is scaled down."""
    beta1: Beta | None = None
    """Decay of a running mean of updates (0 to below 1); null: none, and no state for it."""
    scale_parameter: bool = False
    """Multiply the learning rate by the root mean square of the weight, at least 1e-3. An adapter's `B` starts at 0,
    so that it then learns a thousand times slower."""
    weight_decay: WeightDecay = 0.0
    """Decoupled decay of the adapter's weights."""


@optimizers.register(AdafactorSection)
class Adafactor(Optimizer[AdafactorSection]):
    """Source: Shazeer & Stern, Adafactor, 2018, algorithm 4; transformers' implementation.

    torch's own always scales by the weight's root mean square, which keeps `B = 0` where it is.
    """

    builds = "transformers.optimization:Adafactor"

    @property
    def updates_in_place(self) -> bool:
        """Tensor by tensor: what one needs is little beside all of them."""
        return True

    def state_bytes(self, parameters: int) -> int:
        """Row and column means, counted for rank 8, and a full fp32 mean with `beta1`."""
        return 4 * parameters // _TYPICAL_RANK + (4 * parameters if self.section.beta1 is not None else 0)

    def options(self, device: torch.device) -> JsonObject:
        """The section's, with relative steps off."""
        return {**super().options(device), "relative_step": False, "warmup_init": False}
