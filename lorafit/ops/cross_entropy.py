"""Cross-entropy of labelled hidden states against a linear head, in chunks: no logits where no label is.

    hidden [labels, hidden] --chunk--> logits [chunk, vocabulary] --> loss, and at once the chunk's gradient
                                       (fp32, of `chunk_labels` labels, gone before the next chunk)

The gradient of the hidden states is computed in the forward pass, while the chunk's probabilities exist; the backward
pass only scales it. With p = softmax(h W^T + b) and one-hot y:  d loss / d h = (p - y) W,  d loss / d W = (p - y)^T h,
d loss / d b = p - y.  Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lorafit.ops.chunk_sizes import chunk_labels
from lorafit.ops.kernels import PLAIN, Kernels, in_full


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    chunk_bytes: int | None = None,
    kernels: Kernels = PLAIN,
) -> torch.Tensor:
    """Summed cross-entropy.

    Args:
        hidden: Labelled hidden states, [labels, hidden].
        weight: The head, [vocabulary, hidden]; gets a gradient where it is trained.
        bias: The head's bias, [vocabulary], or None.
        labels: Token ids, [labels].
        chunk_bytes: Of a chunk's fp32 logits; what is usual on the device where None.
        kernels: What computes loss and gradient of a chunk.

    Returns:
        An fp32 scalar, in nats; differentiable once.
    """
    loss_sum: torch.Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, chunk_bytes, kernels
    )
    return loss_sum


def linear_label_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """The loss of each label, fp32 [labels], with a gradient: logits are computed once more in the backward pass.

    For losses that are no plain sum: what each label's gradient is scaled by is known when all losses are.

    Args:
        hidden: As for `linear_cross_entropy`, and so the others.
    """
    states, head, head_bias = _as_computed(hidden, weight, bias)
    size = chunk_labels(weight.shape[0], hidden.device.type, chunk_bytes)
    parts = zip(torch.split(states, size), torch.split(labels, size), strict=True)
    again = partial(checkpoint, _label_losses, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(part, head, head_bias, ids) for part, ids in parts])


def _label_losses(
    states: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    logits = functional.linear(states, head, bias)
    return functional.cross_entropy(in_full(logits), labels, reduction="none")


@torch.no_grad()
def score_linear(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    chunk_bytes: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each label, fp32 [labels], and whether it was the most likely token, bool [labels]; no gradient."""
    chunks = _chunks(*_as_computed(hidden, weight, bias), labels, chunk_bytes)
    scored = [score_logits(logits, ids) for _, logits, ids in chunks]
    if not scored:
        return hidden.new_zeros(0, dtype=torch.float32), labels.new_zeros(0, dtype=torch.bool)
    return torch.cat([loss for loss, _ in scored]), torch.cat([correct for _, correct in scored])


def score_logits(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`score_linear` from logits [labels, vocabulary] that exist already; their fp32 copies exist in chunks alone."""
    size = chunk_labels(logits.shape[-1], logits.device.type)
    losses = [
        functional.cross_entropy(in_full(chunk), ids, reduction="none")
        for chunk, ids in zip(torch.split(logits, size), torch.split(labels, size), strict=True)
    ]
    return torch.cat(losses), logits.argmax(-1) == labels


class _ChunkedCrossEntropy(torch.autograd.Function):
    """See the module. Sums are fp32, or fp64 where the input is."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        chunk_bytes: int | None,
        kernels: Kernels,
    ) -> torch.Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wants_gradient = wants_hidden or wants_weight or wants_bias
        states, head, head_bias = _as_computed(hidden, weight, bias)
        full = in_full(hidden[:0]).dtype
        loss_sum = hidden.new_zeros((), dtype=full)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=full) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=full) if bias is not None and wants_bias else None

        for rows, logits, ids in _chunks(states, head, head_bias, labels, chunk_bytes):
            loss, error = kernels.logit_errors(logits, ids, wants_gradient)
            loss_sum += loss
            if error is None:
                continue
            if grad_bias is not None:
                grad_bias += error.sum(dim=0)
            error = error.to(states.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = (error @ head).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += error.T @ states[rows]

        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return loss_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In full precision: an fp16 loss scale alone may be more than fp16 holds.
        gradients = [None if g is None else (in_full(g) * grad_loss).to(g.dtype) for g in ctx.saved_tensors]
        return (*gradients, None, None, None)


def _as_computed(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Operands in the dtype that a linear layer would compute in here: autocast's, else the head's own."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    chunk_bytes: int | None,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yields (rows, logits [chunk, vocabulary], labels [chunk])."""
    size = chunk_labels(weight.shape[0], hidden.device.type, chunk_bytes)
    for start in range(0, hidden.shape[0], size):
        rows = slice(start, start + size)
        yield rows, functional.linear(hidden[rows], weight, bias), labels[rows]
