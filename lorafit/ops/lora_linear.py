"""A frozen linear and its LoRA branch as one differentiable operation.

    h = s x_a A^T              [tokens, r]      x_a: the input, or the input after dropout
    y = x W^T + b + h B^T      [tokens, out]    the branch is added while its product is computed

Run apart, the two cost five more passes over [tokens, out]. Here the backward pass keeps x_a where A is trained (which
linears of one input share; a gated product is multiplied again instead), h, and A and B in the compute dtype; a packed
4-bit W is unpacked for each product and forgotten.
Source: Hu et al. 2021, LoRA (https://arxiv.org/abs/2106.09685), equation 3, differentiated by hand:

    d y/d B -> dy^T h          d y/d A -> dh^T x_a          with dh = s dy B
    d y/d x -> dy W + dh A
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional

from lorafit.ops.kernels import PLAIN, Kernels

_A = 4  # among the operation's inputs


class AdaptedWeight(NamedTuple):
    """A frozen linear and its LoRA branch.

    Attributes:
        a: [r, in]; cast to the dtype of the linear's input x.
        b: [out, r]; cast likewise.
        weight: Frozen: [out, in] in the dtype of x, or bitsandbytes' packed 4-bit weight with its `quant_state`.
        quant_state: bitsandbytes' QuantState whose dtype is that of x; None: `weight` is not quantised.
        bias: Frozen, [out], or None.
        scaling: alpha / r, or whatever the method says.
        narrow_a: A in the dtype of x, where it was cast already; gradients go to `a`.
        narrow_b: B likewise.
    """

    a: torch.Tensor
    b: torch.Tensor
    weight: torch.Tensor
    quant_state: Any
    bias: torch.Tensor | None
    scaling: float
    narrow_a: torch.Tensor | None = None
    narrow_b: torch.Tensor | None = None

    def cast(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B in the dtype of x."""
        if self.narrow_a is None or self.narrow_b is None or self.narrow_a.dtype != dtype:
            return self.a.to(dtype), self.b.to(dtype)
        return self.narrow_a, self.narrow_b


def lora_linear(
    x: torch.Tensor,
    dropped: torch.Tensor | None,
    linear: AdaptedWeight,
    factors: tuple[torch.Tensor, torch.Tensor] | None = None,
    kernels: Kernels = PLAIN,
) -> torch.Tensor:
    """x W^T + bias + scaling (x_a A^T) B^T.

    Args:
        x: [..., in], in the compute dtype.
        dropped: The adapter's input, [..., in], where it is not x itself.
        linear: [out, in].
        factors: gate and up, [tokens, in], where x is `multiply_silu` of them and they are kept anyway: the backward
            pass then keeps no x.
        kernels: What computes the rest.

    Returns:
        [..., out], in the dtype of x.
    """
    result: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, dropped, *(factors or (None, None)), *linear, kernels
    )
    return result


class _LoraLinear(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        gate: torch.Tensor | None,
        up: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        weight: torch.Tensor,
        quant_state: Any,
        bias: torch.Tensor | None,
        scaling: float,
        narrow_a: torch.Tensor | None,
        narrow_b: torch.Tensor | None,
        kernels: Kernels,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        branch_rows = rows if dropped is None else dropped.reshape(-1, x.shape[-1])
        linear = AdaptedWeight(a, b, weight, quant_state, bias, scaling, narrow_a, narrow_b)
        a_cast, b_cast = linear.cast(x.dtype)
        # In place from here on: neither product's result is kept.
        output = functional.linear(rows, unpack(weight, quant_state), None if bias is None else bias.to(x.dtype))
        inner = kernels.scaled_product(branch_rows, a_cast.t(), scaling)
        output.addmm_(inner, b_cast.t())
        trains_a = ctx.needs_input_grad[_A]  # which alone needs these three
        kept = (None, gate, up) if up is not None else (branch_rows, None, None)
        ctx.save_for_backward(*(kept if trains_a else (None, None, None)), inner, a_cast, b_cast, weight)
        ctx.quant_state, ctx.scaling, ctx.kernels = quant_state, scaling, kernels
        ctx.shape, ctx.is_dropped = x.shape, dropped is not None
        # no view, as a linear's result is none: Llama 4's experts' neighbour writes into it
        reshaped: torch.Tensor = torch.ops.aten._unsafe_view.default(output, [*x.shape[:-1], output.shape[-1]])
        return reshaped

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        branch_rows, gate, up, inner, a, b, weight = ctx.saved_tensors
        wants_x, wants_dropped, _, _, wants_a, wants_b = ctx.needs_input_grad[:6]
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        grad_b = grad.t() @ inner if wants_b else None
        grad_inner = ctx.kernels.scaled_product(grad, b, ctx.scaling)
        grad_a = None
        if wants_a:
            grad_a = grad_inner.t() @ (ctx.kernels.multiply_silu(gate, up) if branch_rows is None else branch_rows)
        grad_x = grad_dropped = None
        if wants_x:
            grad_x = grad @ unpack(weight, ctx.quant_state)
            if not ctx.is_dropped:
                grad_x.addmm_(grad_inner, a)
            grad_x = grad_x.view(ctx.shape)
        if wants_dropped:
            grad_dropped = (grad_inner @ a).view(ctx.shape)
        return grad_x, grad_dropped, None, None, grad_a, grad_b, *(None,) * 7


def unpack(weight: torch.Tensor, quant_state: Any) -> torch.Tensor:
    """[out, in] in the compute dtype; a weight without a state is that already."""
    if quant_state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    unpacked: torch.Tensor = dequantize_4bit(weight, quant_state)
    return unpacked
