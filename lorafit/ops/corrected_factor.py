"""A or B of a LoRA whose first half is trained, and whose second half is held: what the first began with, sign turned.

    s [B, -B0] [A; A0] = s (B A - B0 A0)        zero before the first step, whatever A0 and B0 are

So a method may begin with a part of the base's weight, and train it, while the base stays as it is: what it would take
out of the weight stands in the adapter. As one module it is an ordinary factor of rank 2r to whoever multiplies with
`weight`; only `trained` has a gradient and an optimizer's state.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional


class CorrectedFactor(nn.Module):
    """Both halves of a factor.

    Args:
        whole: A `[2r, in]`, or B `[out, 2r]`.
        dim: The axis of 2r.
    """

    held: torch.Tensor

    def __init__(self, whole: torch.Tensor, dim: int) -> None:
        super().__init__()
        trained, held = whole.detach().chunk(2, dim)
        self._dim = dim
        self.trained = nn.Parameter(trained.clone())
        self.register_buffer("held", torch.zeros_like(held))

    @property
    def weight(self) -> torch.Tensor:
        """Both halves in one, a copy; its gradient reaches the trained one."""
        return torch.cat([self.trained, self.held], self._dim)

    @torch.no_grad()
    def take(self, whole: torch.Tensor) -> None:
        """Takes the values of both halves, in place."""
        for half, values in zip((self.trained, self.held), whole.chunk(2, self._dim), strict=True):
            half.copy_(values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x times the transposed factor."""
        return functional.linear(x, self.weight)


def correct_layers(model: nn.Module, name: str) -> None:
    """Parts the factors of every LoRA layer of a fresh adapter, whose rank is 2r, in two.

    Args:
        model: PEFT's.
        name: The adapter's.
    """
    for layer in list(model.modules()):
        for group, dim in (("lora_A", 0), ("lora_B", 1)):
            factors = getattr(layer, group, {})
            if name in factors and not isinstance(factors[name], CorrectedFactor):
                factors[name] = CorrectedFactor(factors[name].weight, dim)


def corrected_factors(model: nn.Module, name: str) -> Iterator[tuple[str, CorrectedFactor]]:
    """Every one of an adapter, by its path without the adapter's name, as on disk."""
    for path, module in model.named_modules():
        if isinstance(module, CorrectedFactor) and path.endswith(f".{name}"):
            yield path.removesuffix(f".{name}"), module
