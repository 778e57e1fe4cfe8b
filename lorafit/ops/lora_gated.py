"""Both halves of a gated MLP, two frozen linears with LoRA branches, and their gated product as one operation.

    h_i = s_i x A_i^T      g_i = x W_i^T + b_i + h_i B_i^T      y = silu(g_gate) * g_up

Both A are one product, the gradient of x is gathered where it is computed, and the backward pass keeps what
`lorafit.ops.lora_linear` and `silu_product` keep together. Packed 4-bit weights are unpacked one at a time.
Source: Shazeer 2020, GLU Variants Improve Transformer (https://arxiv.org/abs/2002.05202), equation 6, over Hu et al.
2021, LoRA (https://arxiv.org/abs/2106.09685), equation 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from lorafit.ops.kernels import PLAIN, Kernels
from lorafit.ops.lora_linear import AdaptedWeight, unpack

_OPERANDS = len(AdaptedWeight._fields)
_GATE_A, _GATE_B, _UP_A, _UP_B = 2, 3, 2 + _OPERANDS, 3 + _OPERANDS  # among the inputs


def lora_gated(
    x: torch.Tensor, gate: AdaptedWeight, up: AdaptedWeight, kernels: Kernels = PLAIN
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """silu(gate(x)) * up(x).

    Args:
        x: [..., in], in the compute dtype.
        gate: [width, in].
        up: Likewise; rank, scaling and quantisation may differ.
        kernels: What computes products and silu.

    Returns:
        The product, [..., width], in the dtype of x, and its factors gate(x) and up(x), [tokens, width], which the
        backward pass keeps; no gradient goes through these.
    """
    product, *factors = _LoraGated.apply(x, kernels, *gate, *up)  # type: ignore[no-untyped-call]
    return product, (factors[0], factors[1])


class _LoraGated(torch.autograd.Function):
    """See the module. The backward pass has one gradient of x for both linears, and scales each rank's half of h."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kernels: Kernels, *operands: Any) -> tuple[torch.Tensor, ...]:
        gate, up = AdaptedWeight(*operands[:_OPERANDS]), AdaptedWeight(*operands[_OPERANDS:])
        rows = x.reshape(-1, x.shape[-1])
        (gate_a, _), (up_a, _) = casts = gate.cast(x.dtype), up.cast(x.dtype)
        a = torch.cat([gate_a, up_a])
        inner = _scaled_halves(rows, a, gate, up, kernels)
        bs, outputs = [b for _, b in casts], []
        halves = torch.split(inner, [len(gate.a), len(up.a)], dim=1)
        for part, b, h in zip((gate, up), bs, halves, strict=True):
            bias = None if part.bias is None else part.bias.to(x.dtype)
            output = functional.linear(rows, unpack(part.weight, part.quant_state), bias)
            outputs.append(output.addmm_(h, b.t()))
        trains_a = ctx.needs_input_grad[_GATE_A] or ctx.needs_input_grad[_UP_A]
        ctx.save_for_backward(rows if trains_a else None, inner, a, *bs, *outputs, gate.weight, up.weight)
        ctx.states, ctx.scalings = (gate.quant_state, up.quant_state), (gate.scaling, up.scaling)
        ctx.ranks, ctx.shape, ctx.kernels = [len(gate.a), len(up.a)], x.shape, kernels
        ctx.mark_non_differentiable(*outputs)
        ctx.set_materialize_grads(False)  # else the factors would get gradients of zeros
        return (kernels.multiply_silu(*outputs).view(*x.shape[:-1], -1), *outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if grad_output is None:  # nobody used the product
            return (None,) * (2 + 2 * _OPERANDS)
        rows, inner, a, gate_b, up_b, gate, up, gate_weight, up_weight = ctx.saved_tensors
        wants = ctx.needs_input_grad
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        grad_gate, grad_up = ctx.kernels.differentiate_silu(gate, up, grad)
        halves = zip((grad_gate, grad_up), (gate_b, up_b), ctx.scalings, strict=True)
        grad_inner = torch.cat([ctx.kernels.scaled_product(*half) for half in halves], dim=1)
        gate_h, up_h = torch.split(inner, ctx.ranks, dim=1)
        grad_gate_b = grad_gate.t() @ gate_h if wants[_GATE_B] else None
        grad_up_b = grad_up.t() @ up_h if wants[_UP_B] else None
        grad_as: tuple[torch.Tensor | None, ...] = (None, None)
        if wants[_GATE_A] or wants[_UP_A]:
            grad_as = torch.split(grad_inner.t() @ rows, ctx.ranks)
        grad_x = None
        if wants[0]:
            grad_x = grad_gate @ unpack(gate_weight, ctx.states[0])
            grad_x.addmm_(grad_up, unpack(up_weight, ctx.states[1])).addmm_(grad_inner, a)
            grad_x = grad_x.view(ctx.shape)
        frozen = (None,) * (_OPERANDS - 2)
        return grad_x, None, grad_as[0], grad_gate_b, *frozen, grad_as[1], grad_up_b, *frozen


def _scaled_halves(
    rows: torch.Tensor, a: torch.Tensor, gate: AdaptedWeight, up: AdaptedWeight, kernels: Kernels
) -> torch.Tensor:
    """Both h beside each other, [tokens, ranks of both]: one product, where both are scaled alike."""
    if gate.scaling == up.scaling:
        return kernels.scaled_product(rows, a.t(), gate.scaling)
    halves = zip(torch.split(a, [len(gate.a), len(up.a)]), (gate.scaling, up.scaling), strict=True)
    return torch.cat([kernels.scaled_product(rows, half.t(), scaling) for half, scaling in halves], dim=1)
