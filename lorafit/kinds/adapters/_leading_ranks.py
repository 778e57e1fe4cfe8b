"""LoRA layers of which the first ranks alone compute: what DyLoRA and rank growth share.

    A [r, in]      first b rows        h = W x + s B[:, :b] A[:b] x
    B [out, r]     first b columns     what lies behind takes no part, and gets a gradient of zeros

The parameters stay as they are, by name and shape: optimizer, checkpoints and adapters know of no part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorafit.ops.step_hook import StepHook

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


class LeadingRanks(StepHook):
    """Sets how many ranks compute from a step's first forward to behind its update; outside of it all do.

    Args:
        model: With a fresh adapter of PEFT's LoRA.
        most: The recipe's r, of which `lead` counts; a layer of another rank leads in proportion.
    """

    def __init__(self, model: PeftModel, most: int) -> None:
        from peft.tuners.lora import LoraLayer

        name = model.active_adapter
        self.layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        self._name, self._most, self._scalings = name, most, [layer.scaling[name] for layer in self.layers]
        narrow = _narrow_linear()
        for layer in self.layers:
            for part, dim in ((layer.lora_A[name], 0), (layer.lora_B[name], 1)):
                part.__class__, part.leading, part.dim_of_rank = narrow, None, dim

    def lead(self, ranks: int, *, rescaled: bool, frozen: int = 0) -> None:
        """From now on the first ranks compute.

        Args:
            ranks: How many, of r.
            rescaled: Whether the scale is alpha over them, instead of over all.
            frozen: The first of them, which get no gradient.
        """
        for layer, scaling in zip(self.layers, self._scalings, strict=True):
            of_layer = layer.r[self._name]
            leading = max(1, of_layer * ranks // self._most)
            layer.scaling[self._name] = scaling * of_layer / leading if rescaled else scaling
            for part in (layer.lora_A[self._name], layer.lora_B[self._name]):
                part.leading = leading, min(frozen, leading - 1)

    def after_optimizer_step(self, step: int) -> None:
        """All ranks compute again."""
        for layer, scaling in zip(self.layers, self._scalings, strict=True):
            layer.scaling[self._name] = scaling
            for part in (layer.lora_A[self._name], layer.lora_B[self._name]):
                part.leading = None


def _narrow_linear() -> type[torch.nn.Linear]:
    """The class of A and B while a hook decides over them."""
    import torch

    class NarrowLinear(torch.nn.Linear):
        """A linear that computes with the first rows of its weight, or its first columns."""

        leading: tuple[int, int] | None
        dim_of_rank: int

        @property
        def weight(self) -> torch.Tensor:  # type: ignore[override]
            """What computes; contiguous, as an adapter of so many ranks is."""
            whole: torch.Tensor = self._parameters["weight"]  # type: ignore[assignment]
            if self.leading is None:
                return whole
            stop, frozen = self.leading
            moving = whole.narrow(self.dim_of_rank, frozen, stop - frozen)
            still = whole.detach().narrow(self.dim_of_rank, 0, frozen)
            return torch.cat([still, moving], self.dim_of_rank) if frozen else moving.contiguous()

    return NarrowLinear
