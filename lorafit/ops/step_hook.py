"""What methods do between the steps of a run: the contract of whoever acts there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorafit.contracts import JsonValue

if TYPE_CHECKING:
    import torch


class StepHook:
    """What is done between steps (AdaLoRA's budget, DyLoRA's rank, unfreezing); nothing, where it does not say more.

    A fresh one leaves the model as the step has it that takes the most memory: rehearsal and dry run call no
    `before_step`. From there to `after_optimizer_step` nothing changes, so that micro-batches may run abreast.

    Attributes:
        state_bytes: What it keeps on the device from the first step on.
    """

    state_bytes: int = 0

    def news(self, step: int) -> str | None:
        """What is trained from this step on and was not before it, for the log; None for most steps."""
        return None

    def before_step(self, step: int) -> None:
        """Called before the first forward of a step, from 1; once more where the step is repeated with smaller ones.
        Leaves a model that is a pure function of seed, step and the weights behind the last step."""

    def penalty(self) -> torch.Tensor | None:
        """A scalar whose gradient is added to that of the step's loss, once, whatever its micro-batches and ranks."""
        return None

    def after_optimizer_step(self, step: int) -> None:
        """Called after `optimizer.step()` and before gradients are cleared, also where fp16 skipped the update; with
        step 0 by a dry run, whose tensors have no values."""

    def state_dict(self) -> Mapping[str, JsonValue | torch.Tensor]:
        """What a resume needs: values of JSON, and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
