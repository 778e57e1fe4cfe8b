"""Rotary position embedding as one differentiable operation: three passes in place of five, forward and backward.

    y = x * cos + (-x_2, x_1) * sin        x = (x_1, x_2): halves of the last dimension

Source: Su et al. 2021, RoFormer (https://arxiv.org/abs/2104.09864), equation 34, in the layout of transformers' models.
"""

from __future__ import annotations

from typing import Any

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x * cos + (-x_2, x_1) * sin.

    Args:
        x: [batch, heads, seq, size]; size is even.
        cos: [batch or 1, 1, seq, size], in the dtype of x, without a gradient of its own.
        sin: Likewise.

    Returns:
        [batch, heads, seq, size].
    """
    result: torch.Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return result


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
