"""An adapter on disk as products: s B A beside each linear, and nothing else; what is more than that is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorafit.errors import ModelError
from lorafit.files.safetensors import TensorEntry
from lorafit.kinds.adapters import adapters
from lorafit.kinds.adapters._low_rank import LowRankFolding
from lorafit.kinds.folding import AdaptedLayer
from lorafit.model.adapter import AdapterFolder

PREFIX = "base_model.model."
_FACTORS = {".lora_A.weight": "A", ".lora_B.weight": "B"}


@dataclass(frozen=True)
class LowRankLayer:
    """One linear's update.

    Attributes:
        factors: Entries of A `[r, in]` and B `[out, r]`, by these letters.
        scaling: s, by the config's patterns.
    """

    factors: Mapping[str, TensorEntry]
    scaling: float

    @property
    def rank(self) -> int:
        """r of this layer."""
        return self.factors["A"].shape[0]


def method_of(saved: AdapterFolder) -> str:
    """The adapter's kind by the recipe's name."""
    return next(name for name, kind in adapters.items() if kind is saved.kind)


def read_low_rank(saved: AdapterFolder) -> dict[str, LowRankLayer]:
    """Updates by the paths of their linears. Tensors beside those, such as copies of layers, are left to the caller.

    Raises:
        ModelError: The adapter's update is something else; `what` says what, without the file.
    """
    method = method_of(saved)
    if not saved.config.get("r"):
        raise ModelError(f"{method} has no rank")
    folding = saved.kind.folding({**saved.config, "modules_to_save": None})
    if type(folding) is not LowRankFolding:
        raise ModelError(f"the update of {method} is no product s * B A of two matrices")
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in saved.tensors.items():
        for suffix, part in _FACTORS.items():
            if name.endswith(suffix):
                found.setdefault(name.removesuffix(suffix).removeprefix(PREFIX), {})[part] = entry
    if (
        saved.config.get("target_parameters")
        or not found
        or any(factors.keys() != {*"AB"} for factors in found.values())
    ):
        raise ModelError("it has no pairs of A and B beside linears")
    return {
        path: LowRankLayer(factors, folding.scaling(AdaptedLayer(factors, path))) for path, factors in found.items()
    }
