"""Looking at a model and leaving it exactly as it was: modes, gradient flags, random numbers, hooks, NF4 packing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from lorafit.ops.holding import holding
from lorafit.ops.rng import preserved_rng

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module's mode and all random number generators are as before."""
    with preserved_rng(), without_training(model):
        yield


@contextlib.contextmanager
def without_training(model: torch.nn.Module) -> Iterator[None]:
    """The same for a model that draws no random numbers in eval mode.

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
        with torch.no_grad(), whole_inputs(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module in repacking:
            module.support_avx512bf16_for_cpu = True  # type: ignore[assignment]


@contextlib.contextmanager
def in_mode(model: torch.nn.Module, *, training: bool) -> Iterator[None]:
    """Training or eval mode, for a try; afterwards the mode and all random number generators are as before."""
    was_training = model.training
    model.train(training)
    try:
        with preserved_rng():
            yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def tokens_apart(model: torch.nn.Module) -> Iterator[None]:
    """Within it LLM.int8() rounds what a token reads by that token alone.

    Else a column in which any token of the batch has an outlier is computed in 16 bits for all of them.
    """
    with contextlib.ExitStack() as held:
        for module in model.modules():
            state = getattr(module, "state", None)
            if getattr(state, "threshold", 0.0) > 0.0:
                held.enter_context(holding(vars(state), "threshold", 0.0))
        yield


@contextlib.contextmanager
def whole_inputs(model: torch.nn.Module) -> Iterator[None]:
    """Linears on a CPU get inputs that lie in one piece: Mamba layers hand them transposed ones."""

    def make_whole(_: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(as_whole(argument) if torch.is_tensor(argument) else argument for argument in arguments)

    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    with contextlib.ExitStack() as hooks:
        for linear in (linear for linear in linears if linear.weight.device.type == "cpu"):
            hooks.enter_context(linear.register_forward_pre_hook(make_whole))
        yield


def as_whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy whose rows follow each other in memory.

    Where they do not, torch multiplies them on a CPU batch by batch, each with its own copy of the weight; a slice of a
    single sequence, which torch calls contiguous, is among those.
    """
    shape, stride = tensor.shape, tensor.stride()
    if all(stride[place] == stride[place + 1] * shape[place + 1] for place in range(tensor.ndim - 1)):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[None]:
    """The base model alone. PEFT sets `requires_grad` at the end even where it was off, so flags are kept here."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    base = model.get_base_model()
    if not hasattr(base, "prepare_inputs_for_generation"):
        base.prepare_inputs_for_generation = None  # PEFT swaps it with that of a trained prompt, and asks of no model
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
