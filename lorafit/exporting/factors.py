"""A low-rank adapter with one alpha for all layers: what else scales a layer's update is multiplied into its B.

    trained     s_l B_l A_l       s_l = alpha_l / r_l, or alpha_l / sqrt(r_l): patterns and rsLoRA
    written     (a / n_l) B'_l A_l    B'_l = B_l s_l n_l / a

Engines compute a / n_l with one a for the file: n_l is the layer's own rank (llama.cpp), or one rank for all (vLLM). a
is that of most layers, so that an adapter of plain LoRA stays as it is, to the bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lorafit.contracts import JsonMapping
from lorafit.errors import ModelError
from lorafit.files.safetensors import TensorEntry
from lorafit.kinds.folding import why_unknown
from lorafit.model.adapter import AdapterFolder
from lorafit.model.low_rank import PREFIX
from lorafit.model.saved_layers import SavedLayers


@dataclass(frozen=True)
class FoldedLayer:
    """One linear's factors.

    Attributes:
        path: Of the linear.
        a: `[r, in]`, fp32.
        b: `[out, r]`, fp32, its scale folded in.
    """

    path: str
    a: torch.Tensor
    b: torch.Tensor


class FoldedAdapter:
    """An adapter's factors for one alpha.

    Args:
        saved: It.
        base: Tensors of its base's files by name.
        ranks: `own`: an engine divides alpha by the rank of each layer's tensors. `one`: by the largest for all.
        target: The export, for messages.

    Attributes:
        alpha: a.
        rank: The largest.
        folded: How many layers' B differ from what was trained.
        layers: Those with a rank: AdaLoRA may leave a linear none.

    Raises:
        ModelError: What it adds to some weight is no product of two matrices, or it holds more than that.
    """

    def __init__(self, saved: AdapterFolder, base: Mapping[str, TensorEntry], ranks: str, target: str) -> None:
        merged = "merge it: --to gguf, or lorafit merge"
        try:
            own = SavedLayers(saved)
        except ModelError as error:
            if error.file:
                raise
            why = why_unknown(error)
            todo = "answer with it beside its base: --to peft" if why else merged
            raise _refused(saved, target, why or error.what, todo) from error
        if own.whole or own.embeddings:
            what = f"it trains more than products beside linears ({_kinds(saved.config)})"
            raise _refused(saved, target, what, merged)
        found = {path: _Trained.of(own, path, base) for path in own.layers}
        if None in found.values():
            todo = f"{merged}; or make plain LoRA of it with lorafit compose"
            raise _refused(saved, target, own.why_no_product, todo)
        trained = {path: layer for path, layer in found.items() if layer is not None and len(layer.a)}
        if not trained:
            raise _refused(saved, target, "no linear of it is left a rank", "train it anew")
        self.rank = max(len(layer.a) for layer in trained.values())
        products = {
            path: layer.scaling * (len(layer.a) if ranks == "own" else self.rank) for path, layer in trained.items()
        }
        self.alpha = Counter(products.values()).most_common(1)[0][0] or float(self.rank)
        if not (ranks == "own" or self.alpha.is_integer()):  # vLLM's lora_alpha is a whole number
            self.alpha = float(self.rank)
        self.folded = sum(product != self.alpha for product in products.values())
        self.layers = [layer.folded(path, products[path] / self.alpha) for path, layer in trained.items()]

    @property
    def paths(self) -> list[str]:
        """Of the linears."""
        return [layer.path for layer in self.layers]

    def by_name(self) -> dict[str, torch.Tensor]:
        """PEFT's tensors, every one padded with zeros to the largest rank."""
        found: dict[str, torch.Tensor] = {}
        for layer in self.layers:
            wide = layer.a.new_zeros(self.rank, layer.a.shape[1])
            tall = layer.b.new_zeros(layer.b.shape[0], self.rank)
            wide[: len(layer.a)], tall[:, : len(layer.a)] = layer.a, layer.b
            found |= {f"{PREFIX}{layer.path}.lora_A.weight": wide, f"{PREFIX}{layer.path}.lora_B.weight": tall}
        return found


@dataclass(frozen=True)
class _Trained:
    """A layer as it was trained: A `[r, in]` and B `[out, r]` in fp32, and s."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @classmethod
    def of(cls, own: SavedLayers, path: str, base: Mapping[str, TensorEntry]) -> _Trained | None:
        """None where what it adds is no product."""
        fold, weight = own.fold(path), base.get(f"{path}.weight")
        is_transposed = bool(own.saved.config.get("fan_in_fan_out"))
        inputs = None if weight is None else weight.as_matrix().shape[0 if is_transposed else 1]
        found = None if fold is None else fold.factors(inputs)
        if fold is None or found is None:
            return None
        return cls(found[1].float(), (found[0] / (fold.scaling or 1.0)).float(), fold.scaling)

    def folded(self, path: str, share: float) -> FoldedLayer:
        """With so much of its scale in B."""
        return FoldedLayer(path, self.a, self.b if share == 1 else (self.b.double() * share).float())


def _refused(saved: AdapterFolder, target: str, why: str, todo: str) -> ModelError:
    return ModelError(f"{target} cannot hold this adapter: {why}", file=str(saved.path), todo=todo)


def _kinds(config: JsonMapping) -> str:
    named = [key for key in ("modules_to_save", "trainable_token_indices", "lora_bias") if config.get(key)]
    named += ["bias"] if config.get("bias", "none") != "none" else []
    return ", ".join(named) or "layers that are no linears"
