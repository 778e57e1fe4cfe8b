"""Where the weight that an adapter layer updates lies in the files of its base: the table of names, read backwards.

    layer of the adapter --PEFT's own modules--> parameter of the class --TensorNames--> rows of the files' tensors

A run notes it with the adapter (`layers` in lorafit.json), so that a merge needs no model class:

    {"model.layers.0.mlp.up_proj": null}                         the tensor `model.layers.0.mlp.up_proj.weight`, whole
    {"model.layers.0.mlp.up_proj": {"parts": [NAME]}}            another one
    {"model.layers.0.mlp.up_proj": {"parts": [[NAME, 0, 192]]}}  rows of another one
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import ModelError
from lorafit.model.names import Part, TensorNames, read_parts, write_parts

if TYPE_CHECKING:
    from peft import PeftModel

    from lorafit.files.safetensors import TensorEntry

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

    def to_json(self, path: str, rows: Mapping[str, int]) -> JsonObject | None:
        """What differs from the simple case, the whole tensor of the layer's own name; None where nothing does."""
        written: JsonObject = {}
        if self.parts != (_whole(path, rows),):
            written["parts"] = write_parts(self.parts, rows)
        if self.key != path:
            written["key"] = self.key
        if self.matrices != 1:
            written["matrices"] = self.matrices
        if self.transposed:
            written["transposed"] = True
        return written or None


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """What one layer of a live adapter updates.

    Attributes:
        parameter: Its name in the class, without an adapter.
        key, matrices, transposed: See `Home`.
        holders: How many modules hold that very tensor; more than one where it is tied.
        is_plain: Whether both factors are matrices: no convolution.
    """

    parameter: str
    key: str
    matrices: int
    transposed: bool
    holders: int
    is_plain: bool


def adapted_layers(model: PeftModel, adapter: str = "default") -> dict[str, AdaptedLayer]:
    """Every layer of a PEFT model's adapter, by the path its tensors have on disk. The model may be without values."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch.nn import Embedding
    from transformers.pytorch_utils import Conv1D

    base = model.get_base_model()
    holders = Counter(id(value) for module in base.modules() for value in module._parameters.values())
    found = {}
    for path, module in base.named_modules():
        groups = [getattr(module, name, {}) for name in getattr(module, "adapter_layer_names", ())]
        held = next((group[adapter] for group in groups if adapter in group), None)
        if held is None or not isinstance(module, BaseTunerLayer):  # a head saved whole changes no weight
            continue
        own, inner = getattr(module, "parameter_name", None), module.get_base_layer()
        parameter = f"{_INNER.sub('', path)}.{own or 'weight'}"
        value = getattr(inner, own or "weight")
        lies_flat = isinstance(inner, Conv1D) or getattr(inner, "source_cls", None) is Conv1D
        if own is not None:
            lies_flat = value.dim() == 3 and not module._did_swap_in_out_features
        found[path] = AdaptedLayer(
            parameter=parameter,
            key=parameter if own is not None else path,
            matrices=getattr(module, "num_experts", 1) if own is not None else 1,
            transposed=lies_flat or isinstance(inner, Embedding),
            holders=holders[id(value)],
            is_plain=getattr(held, "weight", held).dim() == 2,
        )
    return found


def find_home(path: str, layer: AdaptedLayer, names: TensorNames) -> Home:
    """Where a layer's weight lies.

    Raises:
        ModelError: In no place that an update can be added to; the message says why.
    """
    if layer.holders > 1:
        raise ModelError(
            f"'{path}' has tied weights: {layer.holders} modules share its tensor, an update of one would change all",
            todo="name other target_modules, or untie the base",
        )
    if not layer.is_plain:
        raise ModelError(f"'{path}' is no linear: its update is no product of two matrices")
    if conversion := names.converted.get(layer.parameter):
        raise ModelError(
            f"transformers makes '{layer.parameter}' from {len(conversion.files)} tensors by {conversion.how}, "
            "so that no row of the files is its own"
        )
    parts = names.parts.get(layer.parameter, ())
    if not parts:
        raise ModelError(f"'{layer.parameter}' is in none of the base's files")
    return Home(layer.key, parts, layer.matrices, layer.transposed)


def note_homes(homes: Mapping[str, Home], names: TensorNames) -> JsonObject:
    """What an adapter notes of its layers, by path."""
    return {path: home.to_json(path, names.rows) for path, home in homes.items()}


def read_homes(noted: Any, entries: Mapping[str, TensorEntry], file: str) -> dict[str, Home]:
    """What `note_homes` noted.

    Args:
        noted: `layers` of lorafit.json.
        entries: The base's tensors.
        file: Where it was read, for messages.

    Raises:
        ModelError: A tensor that it names is not in the files, or it is not as lorafit writes it.
    """
    rows = {name: entry.as_matrix().rows for name, entry in entries.items()}
    try:
        homes = {path: _read_home(path, written or {}, rows) for path, written in noted.items()}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ModelError("is not as lorafit writes it", file=file, key="layers", todo="restore the file") from error
    for path, home in homes.items():
        lost = [part.name for part in home.parts if part.stop > rows.get(part.name, -1) or part.start < 0]
        if lost:
            raise ModelError(
                f"finds no home in the base: it has no '{lost[0]}' of that size",
                file=file,
                key=path,
                todo="use the base it was trained on",
            )
    return homes


def _read_home(path: str, written: JsonMapping, rows: Mapping[str, int]) -> Home:
    parts = read_parts(written.get("parts", ()), rows) or (_whole(path, rows),)
    return Home(str(written.get("key", path)), parts, int(written.get("matrices", 1)), bool(written.get("transposed")))


def _whole(path: str, rows: Mapping[str, int]) -> Part:
    name = f"{path}.weight"
    return Part(name, 0, rows.get(name, 0))
