"""Where the weight that an adapter layer updates lies in the files of its base: the table of names, read backwards.

    layer of the adapter --PEFT's own modules--> parameter of the class --TensorNames--> rows of the files' tensors

A run notes it with the adapter (`layers` in lorafit.json), so that a merge needs no model class:

    {"model.layers.0.mlp.up_proj": {"key": "model.layers.0.mlp.up_proj", "parts": [[TENSOR, 0, 192]], "matrices": 1,
                                    "transposed": false}}
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorafit.contracts import JsonObject
from lorafit.errors import ModelError
from lorafit.files.safetensors import TensorEntry
from lorafit.model.names import Part, TensorNames, note_parts, read_parts, require_parts, rows_of

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.nn import Module

_INNER = re.compile(r"(\.base_layer)+$")


@dataclass(frozen=True, slots=True)
class Home:
    """Where one adapter layer's weight lies.

    Attributes:
        key: What PEFT matches patterns of ranks and alphas with: the layer's path, or the parameter's own name.
        parts: The rows of the files that make it up, in order.
        matrices: How many matrices are stacked in it, one for each expert; 1 for a linear.
        transposed: Whether its matrices lie `[in, out]`, as GPT-2's, and as embeddings.
    """

    key: str
    parts: tuple[Part, ...]
    matrices: int = 1
    transposed: bool = False

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(part.stop - part.start for part in self.parts)

    def to_json(self) -> JsonObject:
        """Plain values."""
        return {**asdict(self), "parts": note_parts(self.parts)}


def find_homes(model: PeftModel, names: TensorNames) -> dict[str, Home]:
    """Where the weight of each layer of a PEFT model's adapter lies, by the path its tensors have on disk.

    The model may be without values.

    Raises:
        ModelError: A weight lies in no place that an update can be added to; says why, and of how many more.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch.nn import Embedding
    from torch.nn.modules.conv import _ConvNd
    from transformers.pytorch_utils import Conv1D

    from lorafit.ops.trained_copies import LAYERS

    base = model.get_base_model()
    holders = Counter(id(value) for module in base.modules() for value in module._parameters.values())
    homes: dict[str, Home] = {}
    failures: list[ModelError] = []
    for path, module in base.named_modules():
        groups = [getattr(module, name, {}) for name in getattr(module, "adapter_layer_names", ())]
        has_some = any("default" in group for group in groups)
        if not has_some or not isinstance(module, BaseTunerLayer):  # a head saved whole changes no weight
            continue
        if LAYERS in module.adapter_layer_names:
            found, failed = _homes_of_copy(path, groups[0]["default"], names)
            homes, failures = homes | found, failures + failed
            continue
        if hasattr(module, "trainable_tokens_delta"):  # rows of new tokens take the place of others
            continue
        own, inner = getattr(module, "parameter_name", None), module.get_base_layer()
        parameter = f"{_INNER.sub('', path)}.{own or 'weight'}"
        value = getattr(inner, own or "weight")
        is_plain = own is not None or not isinstance(inner, _ConvNd)
        if why := _why_homeless(path, parameter, holders[id(value)], names, is_plain=is_plain):
            failures.append(why)
        elif own is not None:
            flips = value.dim() == 3 and not module._did_swap_in_out_features
            homes[path] = Home(parameter, names.parts[parameter], getattr(module, "num_experts", 1), flips)
        else:
            lies_flat = isinstance(inner, Conv1D | Embedding) or getattr(inner, "source_cls", None) is Conv1D
            homes[path] = Home(path, names.parts[parameter], 1, lies_flat)
    if failures:
        failures[0].what += f" (and {len(failures) - 1} layers more)" if len(failures) > 1 else ""
        raise failures[0]
    return homes


def _homes_of_copy(path: str, copy: Module, names: TensorNames) -> tuple[dict[str, Home], list[ModelError]]:
    """Homes of the trained parameters of a layer's copy; those that layers share have one."""
    from lorafit.ops.trained_copies import own_parameters

    homes, failures = {}, []
    for own in own_parameters(copy):
        parameter = f"{path}.{own}"
        if why := _why_homeless(path, parameter, 1, names, is_plain=True):
            failures.append(why)
        else:
            homes[parameter] = Home(parameter, names.parts[parameter])
    return homes, failures


def _why_homeless(path: str, parameter: str, holders: int, names: TensorNames, *, is_plain: bool) -> ModelError | None:
    """Why a layer's weight has no place that an update can be added to.

    Args:
        path: The layer's.
        parameter: Its weight's name in the class, without an adapter.
        holders: How many modules hold that very tensor; more than one where it is tied.
        names: Of the class and its files.
        is_plain: Whether it is no convolution.
    """
    if holders > 1:
        return ModelError(
            f"'{path}' has tied weights: {holders} modules share its tensor, an update of one would change all",
            todo="name other target_modules, or untie the base",
        )
    if not is_plain:
        return ModelError(f"'{path}' is no linear: its update is no product of two matrices")
    if conversion := names.converted.get(parameter):
        return ModelError(
            f"transformers makes '{parameter}' from {len(conversion.files)} tensors by {conversion.how}, "
            "so that no row of the files is its own"
        )
    return None if names.parts.get(parameter) else ModelError(f"'{parameter}' is in none of the base's files")


def read_homes(noted: Any, entries: Mapping[str, TensorEntry], file: str) -> dict[str, Home]:
    """What an adapter notes of its layers, by path: `Home.to_json` of each.

    Args:
        noted: `layers` of lorafit.json.
        entries: The base's tensors.
        file: Where it was read, for messages.

    Raises:
        ModelError: A tensor that it names is not in the files, or it is not as lorafit writes it.
    """
    homes = {}
    try:
        for path, home in noted.items():
            parts, matrices = read_parts(home["parts"]), int(home["matrices"])
            homes[path] = Home(str(home["key"]), parts, matrices, bool(home["transposed"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError("is not as lorafit writes it", file=file, key="layers", todo="restore the file") from error
    require_parts({path: home.parts for path, home in homes.items()}, rows_of(entries), file)
    return homes
