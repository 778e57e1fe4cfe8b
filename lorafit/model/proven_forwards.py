"""Training forwards of norms, gated MLPs and rotary attention, taken only where they are proven to compute the same.

A layer is taken by what it computes: on random input its class is compared with the replacement, results and gradients,
and left alone where they differ.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lorafit.model.fused_lora import joinable
from lorafit.ops.kernel_proof import are_close
from lorafit.ops.kernels import PLAIN, Kernels
from lorafit.ops.layer_functions import rms_norm, rotate, silu_product
from lorafit.ops.lora_gated import lora_gated
from lorafit.ops.lora_linear import lora_linear
from lorafit.ops.rng import preserved_rng

_ROTARY = "apply_rotary_pos_emb"  # as every modeling file of transformers calls it
_PROBE_ROWS, _PROBE_WIDTH = 4, 16
Forward = Callable[..., Any]


def proven_forward(
    module: nn.Module, known: dict[type, Forward | None], kernels: Kernels
) -> tuple[str, Forward | None]:
    """Kind and forward; `known` grows with each class that was proven or refused."""
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
    linears = joinable(self.gate_proj, x), joinable(self.up_proj, x)
    if linears[0] is not None and linears[1] is not None:
        product, factors = lora_gated(x, linears[0], linears[1], kernels)
        down = joinable(self.down_proj, product)
        if down is not None:
            return lora_linear(product, None, down, factors, kernels)
    else:
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = silu_product(gate, up, kernels) if gate.dtype == up.dtype else self.act_fn(gate) * up
    output: torch.Tensor = self.down_proj(product)
    return output


def _prove(forward: Forward, module: nn.Module, kernels: Kernels) -> Forward | None:
    """The forward, if a miniature computes the same with it on random input, and passes the same gradient on to it."""
    with preserved_rng():
        torch.manual_seed(0)
        miniature = _miniature(module)
        probe = 2 * torch.randn(1, _PROBE_ROWS, _PROBE_WIDTH).to(next(miniature.parameters()).dtype)
        both = (type(module).forward, partial(forward, PLAIN))
        agree = _agree([partial(function, miniature) for function in both], probe)
    return partial(forward, kernels) if agree else None


def _agree(functions: Sequence[Forward], *probes: torch.Tensor) -> bool:
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


def _with_fused_rotary(module: nn.Module, kernels: Kernels) -> Forward | None:
    """The same code over the same names, but for its rotation; None where that rotates otherwise."""
    forward: Any = type(module).forward
    own = forward.__globals__[_ROTARY]
    if not _rotates_the_same(own, _fuse_rotary(own, PLAIN)):
        return None
    names = {**forward.__globals__, _ROTARY: _fuse_rotary(own, kernels)}
    copied = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied


def _fuse_rotary(own: Forward, kernels: Kernels) -> Forward:
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


def _rotates_the_same(own: Forward, fused: Forward) -> bool:
    """Whether both agree on random queries, keys and angles, whose halves differ, and on the gradients."""
    with preserved_rng():
        torch.manual_seed(0)
        q, k = (torch.randn(2, heads, _PROBE_ROWS, _PROBE_WIDTH) for heads in (3, 1))
        cos, sin = torch.randn(2, 2, _PROBE_ROWS, _PROBE_WIDTH)
        return _agree([lambda q, k, rotate=rotate: rotate(q, k, cos, sin) for rotate in (own, fused)], q, k)
