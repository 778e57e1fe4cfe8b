"""The training forward of a linear with LoRA: base product and branch in one operation, everything unusual PEFT's way.

Beside it stands what its layers may hold for a while: the dequantised weight of a 4-bit base, and A and B in the
compute dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorafit.kinds.quantizations import kind_of_codes
from lorafit.ops.dropout import drop
from lorafit.ops.fusible import fuses_branch
from lorafit.ops.kernels import Kernels
from lorafit.ops.lora_linear import AdaptedWeight, lora_linear, unpack

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_NARROW = "narrow_adapter"  # attribute of a layer


def keep_unpacked(model: nn.Module, wanted: bool = True) -> int:
    """Lets each fused LoRA layer over a 4-bit linear keep the dequantised weight for its training forward.

    The copy is the one that each product would make anew, so that not a bit changes. It is a plain attribute: no
    parameter, no buffer, in no state dict; PEFT's own forward does without it.

    Args:
        model: After `fuse_layers`, its weights where they stay; fake ones under their FakeTensorMode.
        wanted: Else the copies that are there are let go of.

    Returns:
        How many layers keep one.
    """
    kept = 0
    for module in model.modules():
        if not _is_fused_lora(module):
            continue
        base: Any = module.base_layer
        state, own = getattr(base.weight, "quant_state", None), vars(module)
        if not wanted:
            own.pop("unpacked_weight", None)
            own.pop("unpacked_state", None)
        elif state is not None and _unpacks_plainly(base, state):
            if own.get("unpacked_state") is not state:
                with torch.no_grad():
                    copied = unpack(base.weight, state)
                own.update(unpacked_weight=copied, unpacked_state=state)
            kept += 1
    return kept


@contextlib.contextmanager
def cast_adapters(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, the fused LoRA layers use copies of A and B in the compute dtype that are made here, all in one pass.

    Their weights must stay as they are meanwhile: from the first forward of a step to its last backward.

    Args:
        model: After `fuse_layers`.
        dtype: Of compute; None: as the weights are, and nothing is copied.
    """
    named = _fused_layers(model) if dtype is not None else []
    weights = [part[name].weight.detach() for layer, name in named for part in (layer.lora_A, layer.lora_B)]
    copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    if copies:
        torch._foreach_copy_(copies, weights)
    for number, (layer, _) in enumerate(named):
        vars(layer)[_NARROW] = copies[2 * number], copies[2 * number + 1]
    del copies, weights
    try:
        yield
    finally:
        for layer, _ in named:
            vars(layer).pop(_NARROW, None)


def cast_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the copies that `cast_adapters` makes."""
    factors = [part[name].weight for layer, name in _fused_layers(model) for part in (layer.lora_A, layer.lora_B)]
    return dtype.itemsize * sum(int(factor.numel()) for factor in factors if factor.dtype != dtype)


def _fused_layers(model: nn.Module) -> list[tuple[Any, str]]:
    """Every fused LoRA layer with the name of its one adapter, where that is ordinary LoRA."""
    fused = [module for module in model.modules() if _is_fused_lora(module)]
    return [(layer, name) for layer in fused if (name := _single_adapter(layer)) is not None]


def is_lora_linear(module: nn.Module) -> bool:
    """PEFT's LoRA layer over a plain linear or a quantised one, where both run as one operation."""
    kind = type(module)
    if not kind.__module__.startswith("peft.tuners.lora.") or kind.__name__ not in ("Linear", "Linear4bit"):
        return False
    base: Any = module.base_layer
    codes = kind_of_codes(base)
    return fuses_branch(
        of_known_class=codes is not None or type(base) is nn.Linear,
        keeps_input=codes is not None and codes.keeps_inputs,
        transposed=bool(module.fan_in_fan_out),
    )


def _is_fused_lora(module: nn.Module) -> bool:
    function = getattr(vars(module).get("forward"), "__func__", None)
    return getattr(function, "func", None) is lora_forward


def lora_forward(kernels: Kernels, self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """PEFT's forward, in one operation where nothing unusual is asked of it."""
    name = _single_adapter(self)
    if args or kwargs or name is None or not _computes_plainly(self, name, x):
        result: torch.Tensor = type(self).forward(self, x, *args, **kwargs)
        return result
    dropout = self.lora_dropout[name]
    dropped = None if isinstance(dropout, nn.Identity) or not self.training else drop(x, dropout.p)
    return lora_linear(x, dropped, _adapted_weight(self, name), kernels=kernels)


def _adapted_weight(layer: Any, name: str) -> AdaptedWeight:
    base = layer.base_layer
    weight, state = base.weight, getattr(base.weight, "quant_state", None)
    if state is not None and vars(layer).get("unpacked_state") is state:  # a merge makes another
        weight, state = layer.unpacked_weight, None
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    narrow = vars(layer).get(_NARROW, (None, None))
    return AdaptedWeight(a, b, weight, state, base.bias, layer.scaling[name], *narrow)


def _single_adapter(layer: Any) -> str | None:
    """The one adapter that is active, where it is ordinary LoRA and nothing is merged."""
    active: list[str] = layer.active_adapters
    if layer.disable_adapters or layer.merged_adapters or len(active) != 1:
        return None
    name = active[0]
    is_plain = name in layer.lora_A and name not in layer.lora_variant and not layer.lora_bias[name]
    return name if is_plain and not layer.fan_in_fan_out else None


def _computes_plainly(layer: Any, name: str, x: torch.Tensor) -> bool:
    """Whether all operands meet in the dtype of x, with gradients recorded and nobody listening at the base."""
    if not torch.is_grad_enabled() or x.numel() == 0:
        return False
    base, a = layer.base_layer, layer.lora_A[name].weight
    if base._forward_hooks or base._forward_pre_hooks or (base.bias is not None and base.bias.requires_grad):
        return False
    kind = x.device.type
    wanted = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else a.dtype
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        stored = base.weight.dtype
    elif not _unpacks_plainly(base, state):
        return False
    else:
        stored = state.dtype
    return x.dtype == wanted == stored and not base.weight.requires_grad


def _unpacks_plainly(base: PreTrainedModel, state: Any) -> bool:
    """Whether a 4-bit weight is dequantised to the dtype that its linear computes in."""
    return not getattr(state, "packing_format_for_cpu", False) and base.compute_dtype == state.dtype


def joinable(layer: Any, x: torch.Tensor) -> AdaptedWeight | None:
    """What a fused LoRA layer multiplies with, where its adapter takes x itself and nobody listens at the layer."""
    if not _is_fused_lora(layer) or layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return None
    name = _single_adapter(layer)
    if name is None or not _computes_plainly(layer, name, x):
        return None
    drops = layer.training and not isinstance(layer.lora_dropout[name], nn.Identity)
    return None if drops else _adapted_weight(layer, name)
