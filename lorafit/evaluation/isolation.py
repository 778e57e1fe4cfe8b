"""Looking at a model and leaving it exactly as it was: modes, gradient flags, random numbers, hooks, NF4 packing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from lorafit.ops.rng import preserved_rng


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module's mode and all random number generators are as before.

    Each module's own flag is kept, since `model.train()` would also wake modules that somebody had put to rest.

    bitsandbytes on a CPU with AVX512-BF16 repacks NF4 weights in place at the first forward in eval mode, and later
    gradients and merges are silently wrong. Loading switches that off; it is switched off here too, so that evaluation
    cannot damage a model however it was loaded.
    """
    modes = [(module, module.training) for module in model.modules()]
    repacking = [module for module, _ in modes if getattr(module, "support_avx512bf16_for_cpu", False)]
    for module in repacking:
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    model.eval()
    try:
        with preserved_rng(), torch.no_grad(), whole_inputs(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module in repacking:
            module.support_avx512bf16_for_cpu = True  # type: ignore[assignment]


@contextlib.contextmanager
def whole_inputs(model: torch.nn.Module) -> Iterator[None]:
    """Linears on a CPU get contiguous inputs: Mamba layers hand them transposed ones.

    Where the rows of an input do not follow each other in memory, torch multiplies row by row, each with its own copy
    of the weight.
    """

    def make_contiguous(_: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(argument.contiguous() if torch.is_tensor(argument) else argument for argument in arguments)

    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [
        linear.register_forward_pre_hook(make_contiguous) for linear in linears if linear.weight.device.type == "cpu"
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The base model alone. PEFT sets `requires_grad` at the end even where it was off, so flags are kept here."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
