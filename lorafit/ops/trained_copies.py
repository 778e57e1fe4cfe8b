"""Layers of a base beside trained copies of them, of which one or the other computes: PEFT's LN_TUNING, for any layer.

    layer ─┬─ base_layer                     frozen, as loaded: what computes with the adapter off
           └─ ln_tuning_layers[adapter]      its copy: fp32 parameters, rounded to the base's dtype to compute

So updates that are smaller than a step of the base's dtype add up, and what computes is what a merge writes. Parameters
that two layers share are shared by their copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

LAYERS = "ln_tuning_layers"


class _Rounded(nn.Module):
    """A parameter as its layer computes with it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """In the base's dtype."""
        return value.to(self.dtype)


class OtherBias(nn.Module):
    """A frozen layer that adds a bias to what it gives, with another bias in its place.

    Args:
        layer: A linear, maybe quantised, or a norm.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        frozen: Any = layer.bias
        self.bias = nn.Parameter(frozen.detach().clone().float())
        self._layer = (layer,)  # in a tuple: it is a module of the model already

    def forward(self, inputs: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        """The layer's result, the difference of the biases added."""
        result: torch.Tensor = self._layer[0](inputs, *more, **named)
        frozen: Any = self._layer[0].bias
        return result.add((self.bias - frozen).to(result.dtype))


def copied_layers(model: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """Layers that have a copy for an adapter, by path."""
    for path, layer in model.named_modules():
        if name in getattr(layer, LAYERS, {}):
            yield path, layer


def own_parameters(copy: nn.Module) -> dict[str, nn.Parameter]:
    """A copy's trained parameters, called as the layer's own."""
    found = copy.named_parameters(remove_duplicate=False)
    return {path.replace("parametrizations.", "").removesuffix(".original"): value for path, value in found}


def train_in_fp32(model: nn.Module, name: str) -> None:
    """Lets copies compute in the dtype of their layers, with parameters in fp32."""
    for _, layer in copied_layers(model, name):
        copy = getattr(layer, LAYERS)[name]
        for own, frozen in layer.base_layer.named_parameters():
            if frozen.dtype != torch.float32:
                trained = copy.get_parameter(own)
                trained.data = trained.data.float()
                parametrize.register_parametrization(copy, own, _Rounded(frozen.dtype), unsafe=True)
    tie_copies(model, name)


def tie_copies(model: nn.Module, name: str) -> None:
    """Gives copies of layers that share a parameter one in its place."""
    first: dict[int, nn.Parameter] = {}
    for _, layer in copied_layers(model, name):
        copy = getattr(layer, LAYERS)[name]
        for own, value in own_parameters(copy).items():
            holder = copy.parametrizations[own] if parametrize.is_parametrized(copy, own) else copy
            kept = first.setdefault(id(getattr(layer.base_layer, own)), value)
            holder._parameters["original" if holder is not copy else own] = kept


def keep_only(model: nn.Module, name: str, has: Callable[[str, str], bool]) -> None:
    """Puts a bias alone in the place of each copy of which nothing else is trained.

    Args:
        model: PEFT's.
        name: The adapter's.
        has: Whether the parameter of a layer is trained, by the layer's path and its own name.
    """
    for path, layer in copied_layers(model, name):
        copies = getattr(layer, LAYERS)
        owned = [own for own in own_parameters(copies[name]) if has(path, own)]
        if owned == ["bias"]:
            copies[name] = OtherBias(layer.base_layer)
