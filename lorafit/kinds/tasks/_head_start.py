"""A head that begins as the best linear one over what it reads of the model at step 0, and not at random.

    training rows ──model as it begins──> what the head's last linear reads ──regression──> its weight and bias

A random head pulls the model about before it knows what for; from a fitted one, steps only teach what no head could.

Source: Kumar et al. 2022, Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution
(https://arxiv.org/abs/2202.10054), section 3.4: linear probing, then fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from lorafit.errors import ModelError
from lorafit.kinds.tasks._heads import head_logits

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lorafit.contracts import Batch
    from lorafit.objective import Objective

Rows = tuple["torch.Tensor", "torch.Tensor"]
"""What the head reads, fp64 [rows, width], and what it is to give of that, [rows, outputs]."""
Fit = Callable[[Rows, Rows | None], Mapping[str, "NDArray[np.float64]"]]
"""From the training rows and held-out ones to `weight` and `bias`."""


def start_head(
    objective: Objective,
    outputs: int,
    wanted: Callable[[Batch], torch.Tensor],
    train: Iterable[Batch],
    held_out: Iterable[Batch] | None,
    fit: Fit,
) -> None:
    """Fits the head's last linear and puts the values in. One without a bias gets its constants along the mean of what
    it reads.

    Args:
        objective: Around the model as it begins, in eval mode.
        outputs: Of the head.
        wanted: What the head is to give of a batch, [rows, outputs].
        train: Micro-batches of the training rows.
        held_out: The same of rows that choose between fits.
        fit: Makes the linear.

    Raises:
        ModelError: The head ends in no linear of so many outputs.
    """
    import torch

    linear = _find_linear(objective.model, outputs)
    rows = _read(objective, linear, wanted, train)
    fitted = fit(rows, None if held_out is None else _read(objective, linear, wanted, held_out))
    weight, bias = (torch.from_numpy(fitted[name]).to(rows[0].device) for name in ("weight", "bias"))
    with torch.no_grad():
        if linear.bias is None:
            mean = rows[0].mean(0)
            weight = weight + torch.outer(bias, mean / mean.square().sum())
        else:
            linear.bias.copy_(bias)
        linear.weight.copy_(weight)


def _find_linear(model: torch.nn.Module, outputs: int) -> torch.nn.Linear:
    from torch import nn

    trained = [(name, module) for name, module in model.named_modules() if "modules_to_save" in name]
    linears = [module for _, module in trained if isinstance(module, nn.Linear) and module.out_features == outputs]
    if not linears:
        raise ModelError("the head ends in no linear layer that could be fitted", key="task.head", todo="leave it out")
    return linears[-1]


def _read(
    objective: Objective, linear: torch.nn.Linear, wanted: Callable[[Batch], torch.Tensor], batches: Iterable[Batch]
) -> Rows:
    """What the linear reads of each row: of a causal model its last token, as transformers takes it."""
    import torch

    from lorafit.ops.virtual_tokens import count_leading_vectors

    before = count_leading_vectors(objective.model)
    read, right, seen = [], [], list[torch.Tensor]()
    hook = linear.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    try:
        for batch in batches:
            with torch.no_grad(), objective.autocast(batch):
                head_logits(objective, batch)
            states = seen.pop()
            if states.dim() > 2:
                last = before + batch["attention_mask"].sum(-1) - 1
                states = states[torch.arange(len(states), device=states.device), last]
            read.append(states.double())
            right.append(wanted(batch).double())
    finally:
        hook.remove()
    return torch.cat(read), torch.cat(right)
