"""Layers that begin to be trained one part after the other, from the output down.

    step     1 .. steps[0] - 1     .. steps[1] - 1     .. the last
    trained  `top` layers          and a part below    all                (two steps)

What lies below the lowest trained layer gets no backward pass, no gradient and no weight decay, and keeps no state in
the optimizer. What stands in no layer, as a head, is trained from the first step.

Source: Howard and Ruder 2018, ULMFiT (https://arxiv.org/abs/1801.06146), section 3.3, which takes an epoch a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lorafit.errors import RecipeError
from lorafit.ops.step_hook import StepHook


class Unfreezing(StepHook):
    """Gives gradients to the upper layers first.

    Args:
        parameters: The trained ones by name.
        layers: Number of each layer from the input, by its path in those names.
        top: Layers that are trained from the first step, counted from the output, of those that are trained at all.
        steps: Steps that are the first with an equal part of the others.

    Raises:
        RecipeError: No layer is left to be unfrozen.
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], layers: Mapping[str, int], top: int, steps: Sequence[int]
    ) -> None:
        self._steps, self._top = steps, top
        self._by_layer: dict[int, list[torch.nn.Parameter]] = {}
        for name, parameter in parameters.items():
            number = next((number for path, number in layers.items() if f".{path}." in f".{name}"), None)
            if number is not None:
                self._by_layer.setdefault(number, []).append(parameter)
        if len(self._by_layer) <= top:
            raise RecipeError(
                f"{len(self._by_layer)} layers are trained, and {top} of them from the first step",
                key="training.unfreezing.top",
                todo="lower it, or leave unfreezing out",
            )

    def layers_at(self, step: int) -> list[int]:
        """Numbers of the layers that a step trains, the upper ones first."""
        numbers = sorted(self._by_layer, reverse=True)
        joined = sum(first <= step for first in self._steps)
        return numbers[: self._top + (len(numbers) - self._top) * joined // len(self._steps)]

    def news(self, step: int) -> str | None:
        """Where layers join."""
        before, now = (len(self.layers_at(which)) for which in (step - 1, step))
        if before == now or step == 1:
            return None
        return f"{now - before} more layers are trained from here on, {now} of {len(self._by_layer)}"

    def before_step(self, step: int) -> None:
        """Freezes what is not its turn yet."""
        trained = set(self.layers_at(step))
        for number, parameters in self._by_layer.items():
            for parameter in parameters:
                parameter.requires_grad_(number in trained)
