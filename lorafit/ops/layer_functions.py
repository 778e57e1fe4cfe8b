"""Root-mean-square norm, gated product and rotary position embedding as single differentiable operations: the same
arithmetic, fewer passes.

Each is what transformers' layers write as five to ten operations, whose results autograd keeps. Here the norm keeps its
input and one number a token, the gated product its two inputs, the rotation its angles; the rest is computed again in
the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

_CACHED_VALUES = 2**18  # a few tensors of half a megabyte in bf16 share a core's cache


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + epsilon) over the last dimension, computed in fp32, rounded before the weight.

    Args:
        x: [..., hidden], of any floating dtype.
        weight: [hidden], frozen, in the dtype of x.
        epsilon: Added to the mean of squares.

    Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, equation 4
    (https://arxiv.org/abs/1910.07467).
    """
    result: torch.Tensor = _RmsNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return result


def silu_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, elementwise; both [..., width] in one dtype.

    Source: Shazeer 2020, GLU Variants Improve Transformer (https://arxiv.org/abs/2002.05202), equation 6.
    """
    result: torch.Tensor = _SiluProduct.apply(gate, up)  # type: ignore[no-untyped-call]
    return result


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x * cos + (-x_2, x_1) * sin, with x = (x_1, x_2) the halves of the last dimension: three passes in place of five.

    Args:
        x: [batch, heads, seq, size]; size is even.
        cos: [batch or 1, 1, seq, size], in the dtype of x, without a gradient of its own.
        sin: Likewise.

    Returns:
        [batch, heads, seq, size].

    Source: Su et al. 2021, RoFormer (https://arxiv.org/abs/2104.09864), equation 34, in the layout of transformers'
    models.
    """
    result: torch.Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return result


class _RmsNorm(torch.autograd.Function):
    """With r = 1 / rms: d x = r g - x r^3 mean(g x), g = dy * weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        full = x.to(torch.float32, copy=True)
        # A norm reads its input once; vecdot, pow and mean write all the products first.
        mean_square = torch.linalg.vector_norm(full, dim=-1, keepdim=True).pow_(2).div_(x.shape[-1])
        scale = mean_square.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return full.mul_(scale).to(x.dtype).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        full = x.float()  # copies and plain fp32 operations: mixed ones, such as x * scale, take twice their time
        grad = (grad_output * weight).float()
        along_x = (grad * full).sum(dim=-1, keepdim=True).div_(-x.shape[-1])
        for _ in range(3):  # not scale^3, which can leave fp32's range
            along_x.mul_(scale)
        grad.mul_(scale).addcmul_(full, along_x)
        return grad.to(x.dtype), None, None


class _SiluProduct(torch.autograd.Function):
    """d up = dy silu(gate);  d gate = dy up silu'(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        width = gate.shape[-1]
        return multiply_silu(gate.reshape(-1, width), up.reshape(-1, width)).view(gate.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shape = grad_output.shape
        rows = (tensor.reshape(-1, shape[-1]) for tensor in (*ctx.saved_tensors, grad_output))
        return tuple(gradient.view(shape) for gradient in differentiate_silu_product(*rows))


class _Rotation(torch.autograd.Function):
    """d x_1 = dy_1 cos_1 + dy_2 sin_2;  d x_2 = dy_2 cos_2 - dy_1 sin_1."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        (x_1, x_2), (sin_1, sin_2) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        output = x * cos
        first, second = output.chunk(2, dim=-1)
        first.addcmul_(x_2, sin_1, value=-1)
        second.addcmul_(x_1, sin_2)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        (dy_1, dy_2), (sin_1, sin_2) = grad_output.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        grad = grad_output * cos
        first, second = grad.chunk(2, dim=-1)
        first.addcmul_(dy_2, sin_2)
        second.addcmul_(dy_1, sin_1, value=-1)
        return grad, None, None


def multiply_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [rows, width], for whoever differentiates it himself."""
    if gate.device.type != "cpu":
        return functional.silu(gate).mul_(up)
    output = torch.empty_like(gate)
    rows = max(1, _CACHED_VALUES // gate.shape[-1])  # stay in a core's cache from one operation to the next
    blocks = (torch.split(tensor, rows) for tensor in (gate, up, output))
    for some_gate, some_up, into in zip(*blocks, strict=True):
        torch.mul(functional.silu(some_gate), some_up, out=into)
    return output


def differentiate_silu_product(
    gate: torch.Tensor, up: torch.Tensor, grad_output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up, each [rows, width] as all that is given."""
    grad_up = functional.silu(gate).mul_(grad_output)
    return torch.ops.aten.silu_backward(grad_output * up, gate), grad_up
