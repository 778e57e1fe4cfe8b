"""The layers of linears that an adapter on disk changes, and the product of two matrices that it adds to each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.console.wording import list_names
from lorafit.errors import ModelError
from lorafit.files.safetensors import TensorEntry
from lorafit.kinds.folding import AdaptedLayer, Fold
from lorafit.model.adapter import AdapterFolder
from lorafit.model.low_rank import PREFIX, method_of

if TYPE_CHECKING:
    import torch

_WHOLE = {"modules_to_save": None, "trainable_token_indices": None}
_EMBEDDING = ".lora_embedding_A"


class SavedLayers:
    """One adapter by its layers.

    Args:
        saved: It.

    Attributes:
        layers: By path.
        whole: Its tensors that belong to none of them: heads, copies, rows of new tokens.
        embeddings: Paths of layers that are embeddings.

    Raises:
        ModelError: It changes no weights of linears, or uses what no kind computes, as that says of a merge
            (`folding.why_unknown`).
    """

    def __init__(self, saved: AdapterFolder) -> None:
        self.saved = saved
        self._folding = saved.kind.folding({**saved.config, **_WHOLE})
        if self._folding.copies is not None:
            raise ModelError("it trains copies of whole layers, which take the place of the base's")
        if saved.config.get("target_parameters"):
            raise ModelError("it adapts experts that are stacked in one parameter (target_parameters)")
        layers: dict[str, dict[str, TensorEntry]] = {}
        self.whole: dict[str, TensorEntry] = {}
        shared = {part: saved.tensors[name] for name, part in self._folding.shared.items() if name in saved.tensors}
        for name, entry in saved.tensors.items():
            place = self._folding.place(name)
            if place is not None:
                layers.setdefault(place[0], dict(shared))[place[1]] = entry
            elif name not in self._folding.shared:
                self.whole[name] = entry
        marks = (name.partition(_EMBEDDING) for name in saved.tensors)
        self.embeddings = {before.removeprefix(PREFIX) for before, mark, _ in marks if mark}
        parts = set(self._folding.parts.values())
        missing = [f"{path}: {part}" for path, found in layers.items() for part in parts - found.keys()]
        if missing:
            raise ModelError(f"lacks tensors of its layers ({list_names(missing)})", todo="get the whole adapter")
        if not layers:
            raise ModelError("it changes no linear")
        self.layers = {path: AdaptedLayer(found, path) for path, found in layers.items()}
        for path, layer in self.layers.items():
            try:
                self._folding.shape(layer)
            except ModelError as error:
                raise error.at(file=str(saved.path), key=path) from error

    @property
    def why_no_product(self) -> str:
        """What is wrong with a layer that has no `factors`."""
        method, formula = method_of(self.saved), self._folding.new_weight
        return f"the new weight of {method} is {formula}, which adds no product of two matrices of its own"

    def fold(self, path: str) -> Fold | None:
        """The change of a layer's whole weight, `[out, in]`; None where it must see the base's to have one."""
        rows, _ = self._folding.shape(self.layers[path])
        return None if rows is None else self._folding.fold(self.layers[path], 0, 0, rows, _no_base)


def _no_base(first: int, stop: int) -> torch.Tensor:
    raise AssertionError("a fold of rows that lie [out, in] reads no base before it is applied")
