"""torch's Adam, whose weight decay is an L2 penalty on the gradient, and AdamW, which decays apart; fp32 state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lorafit.contracts import JsonObject
from lorafit.kinds.optimizers import AdamWOptions, Betas, Optimizer, OptimizerSection, WeightDecay, optimizers

if TYPE_CHECKING:
    import torch


class AdamWSection(AdamWOptions):
    """AdamW of torch, fp32 state: 8 bytes a trainable parameter."""

    kind: Literal["adamw"] = "adamw"


class AdamSection(AdamWOptions):
    """Adam of torch, fp32 state: 8 bytes a trainable parameter."""

    kind: Literal["adam"] = "adam"
    betas: Betas = (0.9, 0.999)
    """Decay of the running mean of gradients and of their squares (each 0 to below 1)."""
    weight_decay: WeightDecay = 0.0
    """L2 penalty, added to the gradient before the moments (AdamW decays apart from them)."""


@optimizers.register(AdamSection)
class Adam(Optimizer[OptimizerSection]):
    """Source: Kingma & Ba, Adam: A Method for Stochastic Optimization, 2015, algorithm 1."""

    builds = "torch.optim:Adam"

    def options(self, device: torch.device) -> JsonObject:
        """The section's; on a GPU in one kernel for all tensors, instead of seven passes over them."""
        return {**super().options(device), **({"fused": True} if device.type == "cuda" else {})}

    @property
    def updates_in_place(self) -> bool:
        """That kernel does."""
        return True

    def state_bytes(self, parameters: int) -> int:
        """Two fp32 moments."""
        return 8 * parameters


@optimizers.register(AdamWSection)
class AdamW(Adam):
    """Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2."""

    builds = "torch.optim:AdamW"
