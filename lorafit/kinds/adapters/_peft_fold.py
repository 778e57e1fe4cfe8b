"""The new weight of a linear under any method of PEFT's, read off what PEFT's layer computes of the unit vectors.

    W  --PEFT's layer over it, in fp64, with the adapter's tensors-->  layer(1) - layer(0) = W'^T

That is the weight of the linear which answers as the layer does, whatever the method, as long as its answer is linear
in the input; that is tried first, and where it is not so, or a bias comes in, there is nothing to merge into.
The layer is made as PEFT makes it over a model of this linear alone, so a method whose layers share what is made for
all of them together is not folded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from lorafit.contracts import JsonMapping
from lorafit.errors import ModelError
from lorafit.files.safetensors import read_rows
from lorafit.kinds.adapters._linears import DenseFold
from lorafit.kinds.folding import AdaptedLayer, Folding

if TYPE_CHECKING:
    import torch

_PROBES = 4
_OF_THE_MODEL = ("auto_mapping", "task_type", "exclude_modules", "layers_to_transform", "layers_pattern")
_LINEAR_WITHIN = 1e-4
_NOT_FOLDED = {
    "BEFT": "beft trains biases, and the base's files need not have any",
    "PVERA": "layers of pvera share matrices drawn for the widest of them, and a merge sees one layer at a time",
    "RANDLORA": "layers of randlora share matrices drawn for the widest of them, and a merge sees one layer at a time",
    "ROAD": "road turns the outputs with their bias, which is no weight of the linear",
}


class PeftFolding(Folding):
    """The linear that answers as PEFT's layer.

    Args:
        config: adapter_config.json.

    Raises:
        ModelError: The method has no such linear.
    """

    parts: ClassVar[dict[str, str]] = {}
    new_weight: ClassVar[str] = "that of the linear which answers as PEFT's layer"

    def __init__(self, config: JsonMapping) -> None:
        name = str(config["peft_type"])
        why = _NOT_FOLDED.get(name)
        if why is None and (config.get("modules_to_save") or config.get("bias", "none") != "none"):
            why = "it trains whole modules or biases beside the layers"
        if why is not None:
            raise ModelError(f"cannot be merged: {why}", todo="answer with the adapter beside its base")
        self._config = config

    def place(self, tensor: str) -> tuple[str, str] | None:
        """By the prefix that PEFT gives the method's tensors."""
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

        prefix = PEFT_TYPE_TO_PREFIX_MAPPING[self._config["peft_type"]]
        path, mark, rest = tensor.removeprefix("base_model.model.").partition(f".{prefix}")
        return (path, f"{prefix}{rest}") if mark and tensor.startswith("base_model.model.") else None

    def shape(self, layer: AdaptedLayer) -> tuple[int | None, int | None]:
        """The base's own. Raises ModelError where it is no linear of its own."""
        if layer.matrices != 1 or layer.transposed:
            raise ModelError("is no linear whose weight lies [out, in]")
        return None, None

    def fold(
        self, layer: AdaptedLayer, matrix: int, first_row: int, stop_row: int, read: Callable[[int, int], torch.Tensor]
    ) -> DenseFold:
        """The rows of the new weight, all of which are made at once.

        Raises:
            ModelError: The weight lies in several tensors, or the layer's answer is not linear in its input.
        """
        if first_row != 0:
            raise ModelError("a weight that is several tensors cannot be merged with this method")
        whole = self._answers(layer, read(0, stop_row))
        return DenseFold(lambda weight, first: whole[first : first + len(weight)])

    def _answers(self, layer: AdaptedLayer, weight: torch.Tensor) -> torch.Tensor:
        """W', fp64."""
        import torch
        from peft import get_peft_config, get_peft_model, set_peft_model_state_dict

        made: Any = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        made.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
        model: Any = made
        for name in reversed(layer.key.split(".")):
            model, inner = torch.nn.Module(), model
            model.add_module(name, inner)
        config = {key: value for key, value in self._config.items() if key not in _OF_THE_MODEL}
        config |= {"target_modules": [layer.key], "inference_mode": True}
        tensors = {f"base_model.model.{layer.key}.{part}": read_rows(entry) for part, entry in layer.tensors.items()}
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, get_peft_config(config))
            told = set_peft_model_state_dict(adapted, tensors)
            if told.unexpected_keys:
                raise ModelError(f"has tensors that PEFT has no place for ({told.unexpected_keys[0]})")
            answer = adapted.double().eval().base_model.model.get_submodule(layer.key)
            zero = answer(torch.zeros(1, weight.shape[1], dtype=torch.float64))
            probes = torch.randn(_PROBES, weight.shape[1], dtype=torch.float64)
            whole: torch.Tensor = answer(torch.eye(weight.shape[1], dtype=torch.float64)).double()
            wanted, scale = answer(probes).double(), float((probes @ whole).abs().max())
        if float(zero.abs().max()) > 0 or float((probes @ whole - wanted).abs().max()) > _LINEAR_WITHIN * scale:
            raise ModelError("its layer answers by no matrix: the answer is not linear in the input")
        return whole.t()
