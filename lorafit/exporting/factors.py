"""A low-rank adapter with one alpha for all layers: what else scales a layer's update is multiplied into its B.

    trained     s_l B_l A_l       s_l = alpha_l / r_l, or alpha_l / sqrt(r_l): patterns and rsLoRA
    written     (a / n_l) B'_l A_l    B'_l = B_l s_l n_l / a

Engines compute a / n_l with one a for the file: n_l is the layer's own rank (llama.cpp), or one rank for all (vLLM). a
is that of most layers, so that an adapter of plain LoRA stays as it is, to the bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lorafit.contracts import JsonMapping
from lorafit.errors import ModelError
from lorafit.files.safetensors import read_rows
from lorafit.kinds.folding import why_unknown
from lorafit.model.adapter import AdapterFolder
from lorafit.model.low_rank import PREFIX, LowRankLayer, read_low_rank

_FACTOR_NAMES = (".lora_A.weight", ".lora_B.weight")


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
        ranks: `own`: an engine divides alpha by the rank of each layer's tensors. `one`: by the largest for all.
        target: The export, for messages.

    Attributes:
        alpha: a.
        rank: The largest.
        folded: How many layers' B differ from what was trained.

    Raises:
        ModelError: It is no low-rank adapter, or holds more than that.
    """

    def __init__(self, saved: AdapterFolder, ranks: str, target: str) -> None:
        merged = "merge it: --to gguf, or lorafit merge"
        try:
            self._layers = read_low_rank(saved)
        except ModelError as error:
            why = why_unknown(error)
            todo = (
                f"{merged}; or make plain LoRA of it with lorafit compose"
                if why is None
                else "answer with it beside its base: --to peft"
            )
            what = f"{target} cannot hold this adapter: {why or error.what}"
            raise ModelError(what, file=str(saved.path), todo=todo) from error
        extra = [name for name in saved.tensors if not name.endswith(_FACTOR_NAMES)]
        if extra:
            what = (
                f"{target} holds products beside linears alone, and this adapter trains more ({_kinds(saved.config)})"
            )
            raise ModelError(what, file=str(saved.path), todo=merged)
        self.rank = max(layer.rank for layer in self._layers.values())
        self._own = ranks == "own"
        products = Counter(self._product(layer) for layer in self._layers.values())
        self.alpha = products.most_common(1)[0][0] or float(self.rank)
        if not (self._own or self.alpha.is_integer()):  # vLLM's lora_alpha is a whole number
            self.alpha = float(self.rank)
        self.folded = sum(count for product, count in products.items() if product != self.alpha)

    @property
    def paths(self) -> list[str]:
        """Of the linears."""
        return list(self._layers)

    def _product(self, layer: LowRankLayer) -> float:
        """The alpha with which an engine would compute the layer's s."""
        return layer.scaling * (layer.rank if self._own else self.rank)

    def layers(self) -> Iterator[FoldedLayer]:
        """One after the other, read from the file."""
        for path, layer in self._layers.items():
            a, b = (read_rows(layer.factors[part]) for part in "AB")
            share = self._product(layer) / self.alpha
            yield FoldedLayer(path, a.float(), b.float() if share == 1 else (b.double() * share).float())

    def by_name(self) -> dict[str, torch.Tensor]:
        """PEFT's tensors, every one padded with zeros to the largest rank."""
        found: dict[str, torch.Tensor] = {}
        for layer in self.layers():
            wide = layer.a.new_zeros(self.rank, layer.a.shape[1])
            tall = layer.b.new_zeros(layer.b.shape[0], self.rank)
            wide[: len(layer.a)], tall[:, : len(layer.a)] = layer.a, layer.b
            found |= {f"{PREFIX}{layer.path}.lora_A.weight": wide, f"{PREFIX}{layer.path}.lora_B.weight": tall}
        return found


def _kinds(config: JsonMapping) -> str:
    named = [key for key in ("modules_to_save", "trainable_token_indices", "lora_bias") if config.get(key)]
    named += ["bias"] if config.get("bias", "none") != "none" else []
    return ", ".join(named) or "layers that are no linears"
