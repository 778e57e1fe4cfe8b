"""What is saved of an adapter, by PEFT's names: parameters of its layers, and modules that are trained whole beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def trained_values(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """Parameters of an adapter by their paths in the model, and of what is trained whole beside it.

    An embedding that is trained whole and is the output head too has two paths: PEFT opens no file with one.
    """
    prefix = str(model.base_model.prefix)
    # a task's own head and the rows of new tokens are saved beside the method's tensors
    marks = (prefix, f".modules_to_save.{name}.", f".trainable_tokens_delta.{name}")
    every = model.named_parameters(remove_duplicate=False)
    return {path: parameter for path, parameter in every if any(mark in path for mark in marks)}


def named_on_disk(model: PeftModel, name: str, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What PEFT saves of these values of an adapter, by the names that it gives them."""
    from peft import get_peft_model_state_dict

    state: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, state_dict=dict(values), adapter_name=name, save_embedding_layers=False
    )
    return state


def head_values(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """A task's own head by its names on disk, beside a method whose other tensors PEFT would not find."""
    mark = f".modules_to_save.{name}."
    return {path.replace(mark, "."): value for path, value in model.named_parameters() if mark in path}
