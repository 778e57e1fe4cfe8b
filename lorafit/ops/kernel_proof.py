"""Compares tables of operations (`lorafit.ops.kernels`) on random input, on the device where they will run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from lorafit.console.wording import first_line
from lorafit.ops.kernels import PLAIN, Kernels
from lorafit.ops.process_memory import is_out_of_memory
from lorafit.ops.rng import preserved_rng

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""How far two ways of computing the same may be apart, of the largest value."""
_ROWS, _WIDTH, _WORDS, _HEADS = 24, 64, 320, 4
_Draw = Callable[..., torch.Tensor]


def are_close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results differ by rounding alone."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    difference = (a.float() - b.float()).abs().max()
    return bool(difference <= TOLERANCE.get(a.dtype, 0.0) * a.float().abs().max())


def prove_kernels(
    kernels: Kernels, instead: Kernels, device: torch.device, dtype: torch.dtype
) -> tuple[Kernels, dict[str, str]]:
    """`kernels`, with operations of `instead` for those that compute anything else than the plain ones.

    Returns:
        The table, and why operations are left out, by their names.
    """
    left_out: dict[str, str] = {}
    for operation, (names, results) in _OPERATIONS.items():
        if all(getattr(kernels, name) is getattr(instead, name) for name in names):
            continue
        with preserved_rng(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            why = _difference(results, kernels, device, dtype)
        if why:
            left_out[operation] = why
            kernels = replace(kernels, **{name: getattr(instead, name) for name in names})
    return kernels, left_out


def _difference(
    results: Callable[[Kernels, _Draw], Sequence[torch.Tensor]],
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """How a table's results differ from the plain ones, in words; empty where they do not."""
    pairs = []
    for table in (PLAIN, kernels):
        torch.manual_seed(0)
        draw: _Draw = lambda *shape: torch.randn(*shape).to(device, dtype)  # noqa: E731
        try:
            pairs.append(results(table, draw))
        except Exception as error:  # a compiler's, a driver's or a signature's: of whatever kind, it does not run here
            if is_out_of_memory(error):
                raise
            return f"it does not run on this device ({first_line(error)[:160]})"
    if all(are_close(plain, other) for plain, other in zip(*pairs, strict=True)):
        return ""
    return "its results are not lorafit's own on this device"


def _product(kernels: Kernels, draw: _Draw) -> Sequence[torch.Tensor]:
    return [kernels.scaled_product(draw(_ROWS, _WIDTH), draw(_WIDTH, 8), 1.5)]


def _norm(kernels: Kernels, draw: _Draw) -> Sequence[torch.Tensor]:
    """Also that the gradient it is given stays: autograd may hold it for others."""
    x, grad, weight = draw(2, _ROWS, _WIDTH), draw(2, _ROWS, _WIDTH), draw(_WIDTH)
    normed, scale = kernels.norm(x, weight, 1e-5)
    return [normed, kernels.norm_backward(grad, x, weight, scale), grad]


def _silu(kernels: Kernels, draw: _Draw) -> Sequence[torch.Tensor]:
    gate, up, grad = (draw(_ROWS, _WIDTH) for _ in range(3))
    product = kernels.multiply_silu(gate, up)
    return [product, *kernels.differentiate_silu(gate, up, grad)]


def _rotation(kernels: Kernels, draw: _Draw) -> Sequence[torch.Tensor]:
    """Also that no operand is written into: attention may read it again."""
    q, k = draw(2, _ROWS, _HEADS, 16).transpose(1, 2), draw(2, _ROWS, 1, 16).transpose(1, 2)
    angles = draw(2, 1, _ROWS, 8).float()
    cos, sin = (torch.cat([turn(angles)] * 2, dim=-1).to(q.dtype) for turn in (torch.cos, torch.sin))
    forwards, backwards = kernels.rotate(q, k, cos, sin, False), kernels.rotate(q, k, cos, sin, True)
    return [*forwards, *backwards, q, k]


def _loss(kernels: Kernels, draw: _Draw) -> Sequence[torch.Tensor]:
    logits = draw(_ROWS, _WORDS)
    labels = torch.arange(_ROWS, device=logits.device) * 7 % _WORDS
    alone, _ = kernels.logit_errors(logits.clone(), labels, False)
    loss, error = kernels.logit_errors(logits.clone(), labels, True)
    assert error is not None
    return [alone, loss, error.to(logits.dtype)]


_OPERATIONS = {
    "product": (("scaled_product",), _product),
    "norm": (("norm", "norm_backward"), _norm),
    "silu": (("multiply_silu", "differentiate_silu"), _silu),
    "rotation": (("rotate", "repeats_angles"), _rotation),
    "loss": (("logit_errors",), _loss),
}
