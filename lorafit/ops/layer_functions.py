"""Root-mean-square norm, gated product and rotary position embedding as single differentiable operations: the same
arithmetic, fewer passes.

Each is what transformers' layers write as five to ten operations, whose results autograd keeps. Here the norm keeps its
input and one number a token, the gated product its two inputs, the rotation its angles; the rest is computed again in
the backward pass. How each is computed says the table that is handed over (`lorafit.ops.kernels`).
"""

from __future__ import annotations

from typing import Any

import torch

from lorafit.ops.kernels import PLAIN, Kernels


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, kernels: Kernels = PLAIN) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + epsilon) over the last dimension, the root in fp32.

    Args:
        x: [..., hidden], of any floating dtype.
        weight: [hidden], frozen, in the dtype of x.
        epsilon: Added to the mean of squares.
        kernels: What computes it.

    Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, equation 4
    (https://arxiv.org/abs/1910.07467).
    """
    result: torch.Tensor = _RmsNorm.apply(x, weight, epsilon, kernels)  # type: ignore[no-untyped-call]
    return result


def silu_product(gate: torch.Tensor, up: torch.Tensor, kernels: Kernels = PLAIN) -> torch.Tensor:
    """silu(gate) * up, elementwise; both [..., width] in one dtype.

    Source: Shazeer 2020, GLU Variants Improve Transformer (https://arxiv.org/abs/2002.05202), equation 6.
    """
    result: torch.Tensor = _SiluProduct.apply(gate, up, kernels)  # type: ignore[no-untyped-call]
    return result


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kernels: Kernels = PLAIN
) -> tuple[torch.Tensor, torch.Tensor]:
    """x * cos + (-x_2, x_1) * sin of q and k, with x = (x_1, x_2) the halves of the last dimension.

    Args:
        q: [batch, heads, seq, size]; size is even.
        k: Likewise; heads may differ.
        cos: [batch or 1, 1, seq, size], in the dtype of q and k, without a gradient of its own.
        sin: Likewise.
        kernels: What computes it.

    Source: Su et al. 2021, RoFormer (https://arxiv.org/abs/2104.09864), equation 34, in the layout of transformers'
    models.
    """
    result: tuple[torch.Tensor, torch.Tensor] = _Rotation.apply(q, k, cos, sin, kernels)  # type: ignore[no-untyped-call]
    return result


class _RmsNorm(torch.autograd.Function):
    """With r = 1 / rms: d x = r g - x r^3 mean(g x), g = dy * weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, kernels: Kernels) -> torch.Tensor:
        normed, scale = kernels.norm(x, weight, epsilon)
        ctx.save_for_backward(x, scale, weight)
        ctx.kernels = kernels
        return normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        return ctx.kernels.norm_backward(grad_output, x, weight, scale), None, None, None


class _SiluProduct(torch.autograd.Function):
    """d up = dy silu(gate);  d gate = dy up silu'(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        width = gate.shape[-1]
        return kernels.multiply_silu(gate.reshape(-1, width), up.reshape(-1, width)).view(gate.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        shape = grad_output.shape
        rows = (tensor.reshape(-1, shape[-1]) for tensor in (*ctx.saved_tensors, grad_output))
        return *(gradient.view(shape) for gradient in ctx.kernels.differentiate_silu(*rows)), None


class _Rotation(torch.autograd.Function):
    """d x_1 = dy_1 cos_1 + dy_2 sin_2;  d x_2 = dy_2 cos_2 - dy_1 sin_1."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kernels: Kernels
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        return kernels.rotate(q, k, cos, sin, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *ctx.kernels.rotate(grad_q, grad_k, *ctx.saved_tensors, True), None, None, None
