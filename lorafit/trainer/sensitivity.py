"""What storing a linear in another kind would change the loss by, for every linear at once: one backward pass.

    y = W x          L(W + E) - L(W) = sum over tokens of (dL/dy) . (E x) + O(E^2),      E = rounded(W) - W

So no gradient of a weight is ever made: where the gradient of a linear's result passes by, it meets E x, and what is
left is a number for each kind. Layers are recomputed one at a time, which keeps their inputs alone in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lorafit.model.checkpointing import set_checkpointing
from lorafit.ops.rng import preserved_rng

if TYPE_CHECKING:
    from lorafit.contracts import Batch
    from lorafit.kinds.quantizations import Quantization
    from lorafit.kinds.section import KindSection
    from lorafit.objective import Objective

Kinds = Mapping[str, "Quantization[KindSection]"]


def measure_changes(
    objective: Objective, batches: Iterable[Batch], kinds: Mapping[str, Kinds]
) -> dict[str, dict[str, float]]:
    """The change of the mean loss of some rows, to first order, by linear and kind.

    Args:
        objective: Around the base as it is, nothing of it trained.
        batches: Of the rows.
        kinds: Those that each linear is tried in, by its path.
    """
    sums = {
        path: torch.zeros(len(tried), dtype=torch.float64, device=objective.device) for path, tried in kinds.items()
    }
    weight = 0.0
    with preserved_rng(), _recomputing(objective), ExitStack() as hooks:
        torch.manual_seed(0)  # of models with dropout of their own that looks at the layer's mode
        for path, tried in kinds.items():
            linear = objective.base.get_submodule(path)
            note = partial(_add_changes, linear, list(tried.values()), sums[path])
            hooks.enter_context(linear.register_forward_hook(partial(_listen, note)))
        for batch in batches:
            found = objective(batch)
            found.loss_sum.backward()
            weight += found.weight
    return {path: dict(zip(tried, (sums[path] / weight).tolist(), strict=True)) for path, tried in kinds.items()}


@contextmanager
def _recomputing(objective: Objective) -> Iterator[None]:
    """Layers that keep their input alone where the model's class can; without dropout, as all else is in eval mode."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    objective.eval()
    layers = [layer for layer in objective.modules() if isinstance(layer, GradientCheckpointingLayer)]
    set_checkpointing(objective.base, bool(layers))
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        set_checkpointing(objective.base, False)
        objective.eval()


def _listen(note: Any, _: torch.nn.Module, reads: tuple[torch.Tensor, ...], result: torch.Tensor) -> torch.Tensor:
    """A linear's result, whose gradient is noted; in the first layer nothing else needs one."""
    heard: torch.Tensor = _Listener.apply(  # type: ignore[no-untyped-call]
        result if result.requires_grad else result.detach().requires_grad_(), reads[0], note
    )
    return heard


class _Listener(torch.autograd.Function):
    """Passes a linear's result on; gives its gradient, with what the linear read, to `note`."""

    @staticmethod
    def forward(ctx: Any, result: torch.Tensor, reads: torch.Tensor, note: Any) -> torch.Tensor:
        ctx.save_for_backward(reads)
        ctx.note = note
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.note(*ctx.saved_tensors, gradients[0])
        return gradients[0], None, None


@torch.no_grad()
def _add_changes(
    linear: Any, tried: list[Quantization[KindSection]], sums: torch.Tensor, reads: torch.Tensor, gradient: torch.Tensor
) -> None:
    """Adds (dL/dy) . (E x) of every kind."""
    weight = linear.weight if hasattr(linear, "in_features") else linear.weight.t()  # Conv1D: [in, out]
    weight, gradient = weight.float().contiguous(), gradient.flatten(0, -2).float()
    reads = reads.flatten(0, -2).float()
    for place, kind in enumerate(tried):
        error = kind.rounded(weight) - weight
        sums[place] += ((reads @ error.t()) * gradient).sum(dtype=torch.float64)
