"""Operations of a layer and of the loss that devices compute in different ways, as tables of which a run takes one.

    PLAIN    torch's operations, block by block where a CPU's caches ask for it; right on every device
    FUSED    torch's on a card, where each launch costs as much as a pass over memory
    liger    Triton kernels of the package liger-kernel (`lorafit.ops.liger`)

A table holds arithmetic alone: what is differentiated, and what is kept for that, say the functions that take one
(`lorafit.ops.layer_functions`, `lora_linear`, `lora_gated`, `cross_entropy`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

_CACHED_VALUES = 2**18  # a few tensors of half a megabyte in bf16 share a core's cache
_Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Kernels:
    """One way to compute each operation.

    Attributes:
        name: As plans and messages call the table: `none` for lorafit's own, `liger`.
        scaled_product: (a, b, scaling) -> scaling a b, of matrices.
        norm: (x, weight, epsilon) -> weight x / rms, and what `norm_backward` takes of it.
        norm_backward: (gradient, x, weight, that) -> the gradient of x.
        multiply_silu: (gate, up) -> silu(gate) up, [rows, width].
        differentiate_silu: (gate, up, gradient) -> the gradients of gate and up, which may lie where these lay.
        rotate: (q, k, cos, sin, backwards) -> both rotated, [batch, heads, seq, size]; the angles are
            [batch or 1, 1, seq, size]. Backwards: the gradients of what was rotated.
        logit_errors: (logits, labels, wants_gradient) -> the summed loss, and the gradient of the logits, which may
            lie where these lay; None where none is wanted.
        repeats_angles: Whether `rotate` reads the first half of the angles alone.
        casts_once: Whether adapters are cast to the compute dtype once a step, all together; else where they are used.
    """

    name: str
    scaled_product: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    norm: Callable[[torch.Tensor, torch.Tensor, float], _Pair]
    norm_backward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    multiply_silu: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    differentiate_silu: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], _Pair]
    rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, bool], _Pair]
    logit_errors: Callable[[torch.Tensor, torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor | None]]
    repeats_angles: bool = False
    casts_once: bool = False


def in_full(tensor: torch.Tensor) -> torch.Tensor:
    """fp32, or what is wider already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# Plain


def _scaled_product(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    return (a @ b).mul_(scaling)


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> _Pair:
    full = x.to(torch.float32, copy=True)
    # A norm reads its input once; vecdot, pow and mean write all the products first.
    mean_square = torch.linalg.vector_norm(full, dim=-1, keepdim=True).pow_(2).div_(x.shape[-1])
    scale = mean_square.add_(epsilon).rsqrt_()
    return full.mul_(scale).to(x.dtype).mul_(weight), scale


def _norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    full = x.float()  # copies and plain fp32 operations: mixed ones, such as x * scale, take twice their time
    wide = (grad * weight).float()
    along_x = (wide * full).sum(dim=-1, keepdim=True).div_(-x.shape[-1])
    for _ in range(3):  # not scale^3, which can leave fp32's range
        along_x.mul_(scale)
    wide.mul_(scale).addcmul_(full, along_x)
    return wide.to(x.dtype)


def _multiply_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    output = torch.empty_like(gate)
    rows = max(1, _CACHED_VALUES // gate.shape[-1])  # stay in a core's cache from one operation to the next
    blocks = (torch.split(tensor, rows) for tensor in (gate, up, output))
    for some_gate, some_up, into in zip(*blocks, strict=True):
        torch.mul(functional.silu(some_gate), some_up, out=into)
    return output


def _differentiate_silu(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor) -> _Pair:
    grad_up = functional.silu(gate).mul_(grad)
    return torch.ops.aten.silu_backward(grad * up, gate), grad_up


def _rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backwards: bool) -> _Pair:
    return _turn(q, cos, sin, backwards), _turn(k, cos, sin, backwards)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backwards: bool) -> torch.Tensor:
    """Three passes in place of five."""
    (x_1, x_2), (sin_1, sin_2) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    output = x * cos
    first, second = output.chunk(2, dim=-1)
    if backwards:
        first.addcmul_(x_2, sin_2)
        second.addcmul_(x_1, sin_1, value=-1)
    else:
        first.addcmul_(x_2, sin_1, value=-1)
        second.addcmul_(x_1, sin_2)
    return output


def _logit_errors(
    raw_logits: torch.Tensor, labels: torch.Tensor, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    logits = in_full(raw_logits)  # then in place: each further pass over [chunk, vocabulary] costs a step 1 %
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    target = logits.gather(-1, labels.unsqueeze(-1))
    exponentials = logits.exp_()
    total = exponentials.sum(dim=-1, keepdim=True)
    loss = (total.log() - target).sum()
    if not wants_gradient:
        return loss, None
    error = exponentials.div_(total)  # softmax, then minus one-hot
    error.scatter_add_(-1, labels.unsqueeze(-1), torch.full_like(target, -1.0))
    return loss, error


PLAIN = Kernels(
    "none",
    scaled_product=_scaled_product,
    norm=_norm,
    norm_backward=_norm_backward,
    multiply_silu=_multiply_silu,
    differentiate_silu=_differentiate_silu,
    rotate=_rotate,
    logit_errors=_logit_errors,
)

# Few launches


def _scaled_in_product(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """The product's own alpha: no pass of its own, and one rounding instead of two."""
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=scaling)


def _fused_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> _Pair:
    """In fp32 throughout, and rounded behind the weight."""
    normed, scale = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, epsilon)
    return normed, scale


def _fused_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    wanted = [True, False]  # the weight is frozen
    grad_x: torch.Tensor = torch.ops.aten._fused_rms_norm_backward(grad, x, [x.shape[-1]], scale, weight, wanted)[0]
    return grad_x


def _multiply_silu_whole(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.silu(gate).mul_(up)


FUSED = replace(
    PLAIN,
    scaled_product=_scaled_in_product,
    norm=_fused_norm,
    norm_backward=_fused_norm_backward,
    multiply_silu=_multiply_silu_whole,
    casts_once=True,
)
