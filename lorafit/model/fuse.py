"""Gives layers of a loaded model a training forward that takes fewer passes over memory.

    LoRA on a linear    base product and branch in one operation; everything unusual goes PEFT's way
    RMSNorm             one operation instead of six
    gated MLP           silu(gate) * up in one operation, gate and up with it where both are LoRA without dropout
    attention           its own code, in which the rotation of queries and keys is one operation

Only the `forward` of instances changes, and only while gradients are recorded: parameters, names, saved adapters,
merges and evaluation are those of PEFT and transformers. Norms, MLPs and rotations are taken by what they compute: each
class is compared with its replacement on random input first, and left alone where they differ. What computes them is a
table (`lorafit.ops.kernels`), which is proven for itself on the device.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorafit.kinds.quantizations import kind_of_codes
from lorafit.ops.dropout import drop
from lorafit.ops.fusible import fuses_branch
from lorafit.ops.kernel_proof import are_close
from lorafit.ops.kernels import PLAIN, Kernels
from lorafit.ops.layer_functions import rms_norm, rotate, silu_product
from lorafit.ops.lora_gated import lora_gated
from lorafit.ops.lora_linear import AdaptedWeight, lora_linear, unpack
from lorafit.ops.rng import preserved_rng

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROTARY = "apply_rotary_pos_emb"  # as every modeling file of transformers calls it
_NARROW = "narrow_adapter"  # attribute of a layer
_PROBE_ROWS, _PROBE_WIDTH = 4, 16
_Forward = Callable[..., Any]


def fuse_layers(model: nn.Module, kernels: Kernels = PLAIN) -> dict[str, int]:
    """Replaces the training forward of what it knows.

    Args:
        model: With its adapter, on any device, the meta device included.
        kernels: What computes its operations.

    Returns:
        How many layers of each kind were replaced: `lora`, `norms`, `gated`, `rotary`.
    """
    counts = {"lora": 0, "norms": 0, "gated": 0, "rotary": 0}
    known: dict[type, _Forward | None] = {}
    for module in list(model.modules()):
        kind, forward = _replacement(module, known, kernels)
        if forward is not None:
            module.forward = types.MethodType(forward, module)
            counts[kind] += 1
    return counts


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
    fused: list[Any] = [module for module in model.modules() if _is_fused_lora(module)] if dtype is not None else []
    named = [(layer, name) for layer in fused if (name := _single_adapter(layer)) is not None]
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


def _replacement(
    module: nn.Module, known: dict[type, _Forward | None], kernels: Kernels
) -> tuple[str, _Forward | None]:
    """Kind and forward; `known` grows with each class that was proven or refused."""
    if "forward" in vars(module):  # somebody else's hook
        return "", None
    if _is_lora_linear(module):
        return "lora", partial(_lora_forward, kernels)
    for kind, looks_like, prove in (
        ("norms", _looks_like_rms_norm, partial(_prove, _rms_norm_forward)),
        ("gated", _looks_like_gated_mlp, partial(_prove, _gated_forward)),
        ("rotary", _calls_rotary, _with_fused_rotary),
    ):
        if looks_like(module):
            if type(module) not in known:
                known[type(module)] = prove(module, kernels)
            return kind, known[type(module)]
    return "", None


# LoRA


def _is_lora_linear(module: nn.Module) -> bool:
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
    return getattr(function, "func", None) is _lora_forward


def _lora_forward(kernels: Kernels, self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
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


# Norms and gated MLPs


def _looks_like_rms_norm(module: nn.Module) -> bool:
    named = list(module.named_parameters(recurse=False))
    is_small = len(named) == 1 and named[0][0] == "weight" and named[0][1].ndim == 1 and not list(module.children())
    return is_small and "RMSNorm" in type(module).__name__ and _epsilon(module) is not None


def _epsilon(module: nn.Module) -> float | None:
    value = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return value if isinstance(value, float) else None


def _rms_norm_forward(kernels: Kernels, self: Any, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled() or self.weight.requires_grad or self.weight.dtype != x.dtype:
        result: torch.Tensor = type(self).forward(self, x)
        return result
    return rms_norm(x, self.weight, _epsilon(self) or 0.0, kernels)


def _looks_like_gated_mlp(module: nn.Module) -> bool:
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return {name for name, _ in module.named_children()} == set(parts)


def _gated_forward(kernels: Kernels, self: Any, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        result: torch.Tensor = type(self).forward(self, x)
        return result
    linears = _joinable(self.gate_proj, x), _joinable(self.up_proj, x)
    if linears[0] is not None and linears[1] is not None:
        product, factors = lora_gated(x, linears[0], linears[1], kernels)
        down = _joinable(self.down_proj, product)
        if down is not None:
            return lora_linear(product, None, down, factors, kernels)
    else:
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = silu_product(gate, up, kernels) if gate.dtype == up.dtype else self.act_fn(gate) * up
    output: torch.Tensor = self.down_proj(product)
    return output


def _joinable(layer: Any, x: torch.Tensor) -> AdaptedWeight | None:
    """What a fused LoRA layer multiplies with, where its adapter takes x itself and nobody listens at the layer."""
    if not _is_fused_lora(layer) or layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return None
    name = _single_adapter(layer)
    if name is None or not _computes_plainly(layer, name, x):
        return None
    drops = layer.training and not isinstance(layer.lora_dropout[name], nn.Identity)
    return None if drops else _adapted_weight(layer, name)


def _prove(forward: _Forward, module: nn.Module, kernels: Kernels) -> _Forward | None:
    """The forward, if a miniature computes the same with it on random input, and passes the same gradient on to it."""
    with preserved_rng():
        torch.manual_seed(0)
        miniature = _miniature(module)
        probe = 2 * torch.randn(1, _PROBE_ROWS, _PROBE_WIDTH).to(next(miniature.parameters()).dtype)
        both = (type(module).forward, partial(forward, PLAIN))
        agree = _agree([partial(function, miniature) for function in both], probe)
    return partial(forward, kernels) if agree else None


def _agree(functions: Sequence[_Forward], *probes: torch.Tensor) -> bool:
    """Whether functions give the same results for some tensors, and the same gradients of these."""
    results = []
    for function in functions:
        leaves = [probe.clone().requires_grad_() for probe in probes]
        try:
            with torch.enable_grad():
                made = function(*leaves)
                outputs = [made] if isinstance(made, torch.Tensor) else list(made)
                gradients = torch.autograd.grad([output.float().cos().sum() for output in outputs], leaves)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return False
        results.append([*(output.detach() for output in outputs), *gradients])
    return len(results[0]) == len(results[1]) and all(are_close(a, b) for a, b in zip(*results, strict=True))


def _miniature(module: Any) -> nn.Module:
    """The same class with small frozen weights on the CPU: what it computes shows on them, and weights may be fake."""
    small: nn.Module = copy.copy(module)
    small.training = True  # a dropout in its code shows then
    if hasattr(module, "gate_proj"):
        shapes = {"gate_proj": (_PROBE_WIDTH, 32), "up_proj": (_PROBE_WIDTH, 32), "down_proj": (32, _PROBE_WIDTH)}
        linears: dict[str, nn.Module] = {name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()}
        small._modules = {**module._modules, **linears}
    else:
        weight = torch.randn(_PROBE_WIDTH).to(module.weight.dtype)
        small._parameters = {"weight": nn.Parameter(weight)}
    return small.requires_grad_(False)


# Rotary attention


def _calls_rotary(module: nn.Module) -> bool:
    """Whether the class's forward, undecorated, calls the rotation of its own modeling file."""
    forward = type(module).forward
    is_plain = isinstance(forward, types.FunctionType) and not hasattr(forward, "__wrapped__")
    return is_plain and _ROTARY in forward.__code__.co_names and callable(forward.__globals__.get(_ROTARY))


def _with_fused_rotary(module: nn.Module, kernels: Kernels) -> _Forward | None:
    """The same code over the same names, but for its rotation; None where that rotates otherwise."""
    forward: Any = type(module).forward
    own = forward.__globals__[_ROTARY]
    if not _rotates_the_same(own, _fuse_rotary(own, PLAIN)):
        return None
    names = {**forward.__globals__, _ROTARY: _fuse_rotary(own, kernels)}
    copied = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied


def _fuse_rotary(own: _Forward, kernels: Kernels) -> _Forward:
    repeats: list[bool] = []  # whether the halves of the angles are the same; looked at once, since the host waits

    def apply_rotary_pos_emb(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 4 or not _rotates_plainly(*args):
            return own(*args, **kwargs)
        q, k, cos, sin = args
        if kernels.repeats_angles and not repeats:
            repeats.append(all(torch.equal(*angles.chunk(2, dim=-1)) for angles in (cos, sin)))
        usable = kernels if not kernels.repeats_angles or repeats[0] else PLAIN
        return rotate(q, k, cos.unsqueeze(1), sin.unsqueeze(1), usable)

    return apply_rotary_pos_emb


def _rotates_plainly(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether all have one dtype, q and k are rotated over their whole even width, and gradients are recorded."""
    if not torch.is_grad_enabled() or cos.requires_grad or sin.requires_grad:
        return False
    size = cos.shape[-1]
    are_shaped = q.ndim == k.ndim == 4 and cos.ndim == 3 and cos.shape == sin.shape
    are_whole = q.shape[-1] == k.shape[-1] == size and size % 2 == 0
    return are_shaped and are_whole and q.dtype == k.dtype == cos.dtype == sin.dtype


def _rotates_the_same(own: _Forward, fused: _Forward) -> bool:
    """Whether both agree on random queries, keys and angles, whose halves differ, and on the gradients."""
    with preserved_rng():
        torch.manual_seed(0)
        q, k = (torch.randn(2, heads, _PROBE_ROWS, _PROBE_WIDTH) for heads in (3, 1))
        cos, sin = torch.randn(2, 2, _PROBE_ROWS, _PROBE_WIDTH)
        return _agree([lambda q, k, rotate=rotate: rotate(q, k, cos, sin) for rotate in (own, fused)], q, k)
