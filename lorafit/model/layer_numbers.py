"""The layers of a language model by number: from 0, an encoder's before those of its decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorafit.ops.output_head import text_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUTSIDE = "outside of the layers"
"""What modules are said to lie in that lie in none: a head, an embedding, the last norm."""


def layer_paths(model: PreTrainedModel) -> dict[str, int]:
    """Number of each layer, by its path in the model."""
    if model.config.is_encoder_decoder:
        stacks = [model.get_encoder(), model.get_decoder()]
    else:
        stacks = [text_part(model) or model]
    lists = [layer_list(stack) for stack in stacks]
    places = {id(part): path for path, part in model.named_modules()}
    paths = [f"{places[id(found)]}.{name}" for found in lists for name, _ in found.named_children()]
    return {path: number for number, path in enumerate(paths)}


def layer_list(stack: PreTrainedModel) -> Any:
    """The modules that a stack runs one after the other: of the lists that lie in no other list the one that has as
    many as its config says, else the longest; an empty one where it has none."""
    import torch

    lists: list[Any] = []
    inside: set[int] = set()
    for module in stack.modules():
        if isinstance(module, torch.nn.ModuleList) and id(module) not in inside:
            lists.append(module)
            inside |= {id(part) for part in module.modules()}
    layers = getattr(stack.config.get_text_config(), "num_hidden_layers", None)
    return max(lists, key=lambda found: (len(found) == layers, len(found)), default=torch.nn.ModuleList())


def layer_of(path: str, layers: dict[str, int]) -> int:
    """Number of the layer that a module lies in, by its path; -1: in none."""
    parts = path.split(".")
    starts = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((layers[start] for start in starts if start in layers), -1)
