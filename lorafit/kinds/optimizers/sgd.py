"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from lorafit.kinds.optimizers import Optimizer, OptimizerSection, WeightDecay, optimizers


class SGDSection(OptimizerSection):
    """SGD of torch: 4 bytes of state a trainable parameter, none without momentum."""

    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Share of the last step's direction that is kept (0 to below 1); 0: plain SGD without state."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    weight_decay: WeightDecay = 0.0
    """L2 penalty, added to the gradient."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SGDSection:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


@optimizers.register(SGDSection)
class SGD(Optimizer[SGDSection]):
    """Source: Sutskever et al., On the importance of initialization and momentum in deep learning, 2013."""

    builds = "torch.optim:SGD"
    follows_gradients: ClassVar[bool] = True

    @property
    def updates_in_place(self) -> bool:
        """Unless decay is added to the gradients first."""
        return not self.section.weight_decay

    def state_bytes(self, parameters: int) -> int:
        """One fp32 buffer where there is momentum."""
        return 4 * parameters if self.section.momentum else 0
