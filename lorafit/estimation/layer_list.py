"""The decoder layers of a model, of which a few can stand for all: a dry run of those takes a fraction of the time.

Layers are alike where they have the same class, the same parameters and the same kind of attention, both keep their
activations or both recompute them, and both stand before the first layer that is trained or neither does: nothing needs
a gradient there. Of each sort the
first layer of the model, the last of the sort, and the last of the model are enough: a step's worst moment lies in the
last layer of some sort, and what one more layer of a sort keeps for the backward pass is seen while it runs forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lorafit.model.fused_lora import cast_bytes
from lorafit.ops.output_head import text_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorafit.ops.live_tensors import LiveTensors


class LayerList:
    """The layers of a model, in order.

    Args:
        base: The model.
        count: How many it has; none are found where no list of the model is so long.
    """

    def __init__(self, base: PreTrainedModel, count: int) -> None:
        decoder = text_part(base) or base  # a vision tower's may be as many
        lists = [module for module in decoder.modules() if isinstance(module, torch.nn.ModuleList)]
        self._list = next((found for found in lists if len(found) == count), torch.nn.ModuleList())
        self._config = base.config.get_text_config()
        self.layers: list[torch.nn.Module] = list(self._list)
        self.all = range(len(self.layers))

    def sorts(self) -> list[str]:
        """What tells a layer's sort, layer by layer."""
        trained = [any(value.requires_grad for value in layer.parameters()) for layer in self.layers]
        return [f"{any(trained[: number + 1])} {_sort_of(layer)}" for number, layer in enumerate(self.layers)]

    def representatives(self) -> list[int]:
        """The first layer, the last of each sort, and the last of all, by number."""
        last = {sort: number for number, sort in enumerate(self.sorts())}
        return sorted({0, *last.values()}) if self.layers else []

    @contextlib.contextmanager
    def only(self, chosen: Sequence[int]) -> Iterator[None]:
        """Inside, the model has the chosen layers alone, and its config says what those are.

        Models look layers up by their place: lists of the config with an entry a layer are cut the same way.
        """
        config, count = vars(self._config), len(self.layers)
        if len(chosen) == count:
            yield
            return
        by_layer = {name: value for name, value in config.items() if isinstance(value, list) and len(value) == count}
        before = {**by_layer, "num_hidden_layers": self._config.num_hidden_layers}
        try:
            config.update({name: [value[number] for number in chosen] for name, value in by_layer.items()})
            self._config.num_hidden_layers = len(chosen)
            self._hold([self.layers[number] for number in chosen])
            yield
        finally:
            for name, value in before.items():
                setattr(self._config, name, value)
            self._hold(self.layers)

    @contextlib.contextmanager
    def weighed(self, live: LiveTensors) -> Iterator[dict[int, int]]:
        """Gives what each layer that runs forward inside keeps for its backward pass, in bytes by its number.

        One before all that is trained keeps nothing: its result takes the place of its input.
        """
        kept: dict[int, int] = {}

        def begin(number: int) -> None:
            if live.phase == "forward":
                kept[number] = -live.live_bytes

        def end(number: int, result: Any) -> None:
            if live.phase == "forward":
                states = result[0] if isinstance(result, tuple) else result
                kept[number] = kept[number] + live.live_bytes if states.requires_grad else 0

        with contextlib.ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                stack.enter_context(layer.register_forward_pre_hook(lambda *_, number=number: begin(number)))
                stack.enter_context(layer.register_forward_hook(lambda *call, number=number: end(number, call[-1])))
            yield kept

    def missing(self, chosen: Sequence[int], kept: Mapping[int, int]) -> int:
        """Bytes that the layers would keep which are not among the chosen, each like the last of its sort."""
        sorts = self.sorts()
        last = {sort: number for number, sort in enumerate(sorts)}
        left_out = set(range(len(sorts))) - set(chosen)
        return sum(kept[last[sorts[number]]] for number in left_out)

    def casts(self, chosen: Sequence[int], dtype: torch.dtype | None) -> int:
        """Bytes of adapters' copies in the compute dtype, which are made before the model runs, of the other layers."""
        if dtype is None:
            return 0
        return sum(cast_bytes(self.layers[number], dtype) for number in set(self.all) - set(chosen))

    def _hold(self, layers: Sequence[torch.nn.Module]) -> None:
        self._list._modules.clear()
        self._list.extend(layers)


def _sort_of(layer: torch.nn.Module) -> str:
    parameters = [(name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()]
    own = {
        name: getattr(layer, name, None)
        for name in ("attention_type", "layer_type", "block_type", "gradient_checkpointing")
    }
    return f"{type(layer).__name__} {own} {parameters}"
