"""The modules of a language model that hold parameters of their own: what methods train that copy whole layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from lorafit.errors import RecipeError
from lorafit.facts import HolderShape
from lorafit.kinds.adapter_parts import CopiedModules
from lorafit.model.targets import READ, left_out_names
from lorafit.ops.output_head import output_head, text_part

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_HOLDS = "they hold parameters beside layers of their own, which a copy would hold too"
_FIXED = "Sinusoidal"  # in the name of a class whose table of positions is computed


def language_modules(model: PreTrainedModel, apart: Collection[str] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Those of the language model and its output head, by path; towers of other modalities stay as they are.

    Args:
        model: Loaded or on the meta device.
        apart: Paths of modules that are trained whole anyway, as a task's own head is.
    """
    head, text = output_head(model), text_part(model)
    inside = {id(part) for part in (text or model).modules()} | ({id(head)} if head is not None else set())
    for path, module in model.named_modules():
        is_apart = any(f"{path}.".startswith(f"{name}.") for name in apart)
        is_fixed = _FIXED in type(module).__name__
        if id(module) in inside and not is_apart and not is_fixed and any(own_sizes(module)):
            yield path, module


def module_paths(model: PreTrainedModel, which: CopiedModules, apart: Collection[str] = ()) -> list[str]:
    """Paths of those that a method copies.

    Raises:
        RecipeError: There is none.
    """
    fits = {"norms": is_norm, "biases": has_free_bias}.get(which)
    read = read_past(model)
    paths = [path for path, module in language_modules(model, apart) if fits is None or fits(module)]
    paths = [path for path in paths if path not in read]
    if not paths:
        raise RecipeError(f"{type(model).__name__} has no {which} to train", key="adapter.kind", todo="use lora")
    return paths


def own_sizes(module: nn.Module) -> list[int]:
    """Parameters of each tensor of its own."""
    return [value.numel() for value in module._parameters.values() if value is not None]


def has_free_bias(module: nn.Module) -> bool:
    """Whether it adds a bias vector to what it gives."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    adds = isinstance(module, nn.Linear | nn.LayerNorm | Conv1D)
    return adds and getattr(module, "bias", None) is not None


def is_norm(module: nn.Module) -> bool:
    """Whether it is a norm over features."""
    name = type(module).__name__
    return "Norm" in name and "Batch" not in name and "Group" not in name


def holder_shapes(model: PreTrainedModel, apart: Collection[str] = ()) -> tuple[HolderShape, ...]:
    """Those modules by the last part of their paths; parameters that several share are counted at the first."""
    found: dict[tuple[str, bool, str], HolderShape] = {}
    seen: set[int] = set()
    read = read_past(model)
    for path, module in language_modules(model, apart):
        fresh = [value for value in module._parameters.values() if value is not None and id(value) not in seen]
        seen |= {id(value) for value in fresh}
        bias = module._parameters["bias"] if has_free_bias(module) else None
        bias_size = sum(value.numel() for value in fresh if value is bias)
        holds = any(True for child in module.children() for _ in child.parameters())
        kind = path.rsplit(".", 1)[-1], is_norm(module), _HOLDS if holds else READ if path in read else ""
        known = found.get(kind, HolderShape(kind[0], 0, 0, 0, 0, is_norm=kind[1], uncopied=kind[2]))
        found[kind] = replace(
            known,
            count=known.count + 1,
            parameters=known.parameters + sum(value.numel() for value in fresh),
            biased=known.biased + (bias_size > 0),
            bias_parameters=known.bias_parameters + bias_size,
        )
    return tuple(found.values())


def read_past(model: PreTrainedModel) -> set[str]:
    """Paths of linears whose weight or bias the model reads past whatever stands in their place, as Mamba's."""
    return {path for path, why in left_out_names(model).items() if why == READ}
