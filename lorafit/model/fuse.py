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

import types
from functools import partial

from torch import nn

from lorafit.model.fused_lora import is_lora_linear, lora_forward
from lorafit.model.proven_forwards import Forward, proven_forward
from lorafit.ops.kernels import PLAIN, Kernels


def fuse_layers(model: nn.Module, kernels: Kernels = PLAIN) -> dict[str, int]:
    """Replaces the training forward of what it knows.

    Args:
        model: With its adapter, on any device, the meta device included.
        kernels: What computes its operations.

    Returns:
        How many layers of each kind were replaced: `lora`, `norms`, `gated`, `rotary`.
    """
    counts = {"lora": 0, "norms": 0, "gated": 0, "rotary": 0}
    known: dict[type, Forward | None] = {}
    for module in list(model.modules()):
        kind, forward = _replacement(module, known, kernels)
        if forward is not None:
            module.forward = types.MethodType(forward, module)
            counts[kind] += 1
    return counts


def _replacement(module: nn.Module, known: dict[type, Forward | None], kernels: Kernels) -> tuple[str, Forward | None]:
    """Kind and forward; None where a layer stays as it is."""
    if "forward" in vars(module):  # somebody else's hook
        return "", None
    if is_lora_linear(module):
        return "lora", partial(lora_forward, kernels)
    return proven_forward(module, known, kernels)
