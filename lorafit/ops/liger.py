"""Liger's Triton kernels as a table of operations: every call into the package liger-kernel stands here.

Taken is the arithmetic of its functions, not their autograd: what is kept is lorafit's own, gradients come where a
later reader expects them, and the host never waits. Of its fused linear cross-entropy only the kernel is taken, over
lorafit's own chunks: the function itself reads two numbers back from the card in each micro-batch, and cuts the labels
into so many chunks that the head is read more often.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lorafit.ops.kernels import FUSED, Kernels

_NO_LABEL = -100
_CASTING = "llama"  # the root in fp32, rounded before the weight


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    from liger_kernel.ops.rms_norm import rms_norm_forward

    normed, _, scale, *_ = rms_norm_forward(x.contiguous(), weight, epsilon, 0.0, _CASTING, None)
    return normed, scale


def _norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.rms_norm import _str_to_casting_mode, rms_norm_backward
    from liger_kernel.ops.utils import calculate_settings

    rows, mode = x.contiguous().view(-1, x.shape[-1]), _str_to_casting_mode[_CASTING]
    in_place, by_row, wants_weight = False, None, False  # autograd may hold grad for others
    grad_x: torch.Tensor = rms_norm_backward(
        grad.contiguous(),
        rows,
        weight,
        scale,
        0.0,
        mode,
        *calculate_settings(x.shape[-1]),
        in_place,
        by_row,
        wants_weight,
    )[0]
    return grad_x


def _multiply_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.swiglu import swiglu_forward

    product: torch.Tensor = swiglu_forward(gate.contiguous(), up.contiguous())[2]
    return product


def _differentiate_silu(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from liger_kernel.ops.swiglu import swiglu_backward

    grad_gate, grad_up = swiglu_backward(gate.contiguous(), up.contiguous(), grad.contiguous())
    return grad_gate, grad_up


def _rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backwards: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    from liger_kernel.ops.rope import rope_backward, rope_forward

    turn = rope_backward if backwards else rope_forward
    turned = turn(_copied(q), _copied(k), cos, sin)
    return turned[0], turned[1]


def _logit_errors(
    logits: torch.Tensor, labels: torch.Tensor, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel
    from liger_kernel.ops.fused_linear_cross_entropy import MAX_FUSED_SIZE
    from triton import next_power_of_2

    rows, words = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    liger_cross_entropy_kernel[(rows,)](
        X_ptr=logits,
        X_stride=logits.stride(0),
        Y_ptr=labels,
        Y_stride=labels.stride(0),
        weight_ptr=None,
        loss_ptr=losses,
        z_loss_ptr=None,
        loss_stride=1,
        token_accuracy_ptr=None,
        token_accuracy_stride=0,
        predicted_tokens_ptr=None,
        predicted_tokens_stride=0,
        n_cols=words,
        n_non_ignore=rows,
        sum_non_ignore_weight=rows,
        weight_sum=0.0,
        ignore_index=_NO_LABEL,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="sum",
        softcap=None,
        RETURN_Z_LOSS=False,
        RETURN_TOKEN_ACCURACY=False,
        RETURN_PREDICTED_TOKENS=False,
        BLOCK_SIZE=min(MAX_FUSED_SIZE, next_power_of_2(words)),
        HAS_WEIGHT=False,
        HAS_SOFTCAPPING=False,
        HAS_GRADIENTS=wants_gradient,
        num_warps=16 if torch.version.hip else 32,
    )
    return losses.sum(), logits if wants_gradient else None


def _copied(x: torch.Tensor) -> torch.Tensor:
    """The same [batch, heads, seq, size], laid out as [batch, seq, heads, size]: the kernel writes into it."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


LIGER = Kernels(
    "liger",
    scaled_product=FUSED.scaled_product,
    norm=_norm,
    norm_backward=_norm_backward,
    multiply_silu=_multiply_silu,
    differentiate_silu=_differentiate_silu,
    rotate=_rotate,
    logit_errors=_logit_errors,
    repeats_angles=True,
    casts_once=True,
)
"""The table. Each operation imports what it calls when it is called."""

# What a dry run on tensors without values takes in their place: results of the same sizes, in the same places


def _sized_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


def _sized_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    return torch.empty_like(x)


SIZED_FUSED = replace(FUSED, norm=_sized_norm, norm_backward=_sized_norm_backward)
SIZED_LIGER = Kernels(
    "liger",
    scaled_product=FUSED.scaled_product,
    norm=_sized_norm,
    norm_backward=_sized_norm_backward,
    multiply_silu=lambda gate, up: torch.empty_like(gate),
    differentiate_silu=lambda gate, up, grad: (gate, up),
    rotate=lambda q, k, cos, sin, backwards: (_copied(q), _copied(k)),
    logit_errors=lambda logits, labels, wants: (logits.new_empty((), dtype=torch.float32), logits if wants else None),
    casts_once=True,
)
