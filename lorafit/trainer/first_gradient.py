"""One gradient before step 1, on one short row: that the model trains at all, and that every kind of adapter learns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lorafit.errors import ModelError, RecipeError
from lorafit.model.check_weights import list_names
from lorafit.ops.isolation import in_mode
from lorafit.ops.memory_errors import is_out_of_memory

if TYPE_CHECKING:
    import torch

    from lorafit.contracts import Batch
    from lorafit.objective import Objective


def prove_gradients(objective: Objective, batch: Batch) -> None:
    """Runs forward and backward in training mode; gradients, modes and random numbers are left as they were.

    Raises:
        ModelError: The model's forward or backward fails in training mode.
        RecipeError: A kind of layer carries adapters that get no gradient anywhere: it reads its weight past them.
    """
    trained = [(name, parameter) for name, parameter in objective.named_parameters() if parameter.requires_grad]
    try:
        with in_mode(objective, training=True):
            objective(batch)[0].backward()
        reached = {_layer_kind(name) for name, parameter in trained if _has_gradient(parameter.grad)}
    except (TypeError, ValueError, IndexError, NotImplementedError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise _cannot_train(objective, error) from error
    finally:
        for _, parameter in trained:
            parameter.grad = None
    _refuse_idle({_layer_kind(name) for name, _ in trained}, reached)


def _refuse_idle(adapted: Iterable[str], reached: set[str]) -> None:
    idle = sorted(set(adapted) - reached)
    if idle:
        others = ", ".join(sorted(reached)) or "other linears"
        raise RecipeError(
            f"the adapters of {list_names(idle)} get no gradient: the model reads those weights past them",
            key="adapter.target_modules",
            todo=f"name others: {others}",
        )


def _cannot_train(objective: Objective, error: Exception) -> ModelError:
    lines = str(error).strip().splitlines()
    return ModelError(
        f"{type(objective.base).__name__} cannot take a training step: {lines[0] if lines else type(error).__name__}",
        todo="use another base model, or another model.attention or model.quantization",
    )


def _layer_kind(parameter: str) -> str:
    """`q_proj` of `model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight`."""
    return parameter.split(".lora_")[0].rsplit(".", 1)[-1]


def _has_gradient(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())
