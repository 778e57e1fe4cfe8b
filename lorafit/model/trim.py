"""A smaller rank for a trained adapter, by its factors alone: no matrix of a weight's size is made.

by SVD      the closest update of rank k (`products`)
nested      the first k ranks as they are, scaled by alpha / k: what DyLoRA trained at k
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from lorafit.contracts import JsonObject
from lorafit.errors import ModelError
from lorafit.files.atomic import MANIFEST
from lorafit.files.safetensors import TensorEntry, read_rows
from lorafit.model.adapter import CONFIG, WEIGHTS, AdapterFolder, write_object
from lorafit.model.low_rank import PREFIX, read_low_rank
from lorafit.model.products import LayerError, Product

_ANEW = "train anew with that rank"


class _Layer:
    """One layer's update, and its factors as they were trained.

    Args:
        factors: Entries of A and B.
        scaling: s.
    """

    def __init__(self, factors: Mapping[str, TensorEntry], scaling: float) -> None:
        self.a, self.b = (read_rows(factors[part]).double() for part in "AB")
        self.update, self.scaling, self.rank = Product(self.a, self.b * scaling), scaling, self.a.shape[0]

    def first(self, rank: int) -> Product:
        """The first ranks with the scale that they were trained with."""
        return Product(self.a[:rank], self.b[:, :rank] * (self.scaling * self.rank / rank))


class Trimming:
    """An adapter whose update is s B A in each layer, cut to smaller ranks.

    Args:
        saved: It.
        nested: Whether its first ranks are an adapter by themselves.

    Raises:
        ModelError: Its update is something else; says what.
    """

    def __init__(self, saved: AdapterFolder, *, nested: bool) -> None:
        self._saved, self._nested = saved, nested
        try:
            layers = read_low_rank(saved)
        except ModelError as error:
            todo = "train a method that has one, e.g. lora" if not saved.config.get("r") else _ANEW
            raise _untrimmable(saved, error.what, todo) from error
        self._layers = {f"{PREFIX}{path}": _Layer(found.factors, found.scaling) for path, found in layers.items()}
        self.rank = max(layer.rank for layer in self._layers.values())

    def write(self, rank: int, folder: Path) -> list[LayerError]:
        """Writes the adapter with ranks of at most `rank` into an empty folder, beside all files that lie with it.

        Returns:
            What each layer loses, in the order of the file; nothing of first ranks, which are another adapter.
        """
        from safetensors.torch import save_file

        for file in self._saved.path.iterdir():
            if file.name not in (CONFIG, WEIGHTS, MANIFEST):
                shutil.copy2(file, folder / file.name)
        config = self._config(rank)
        usual = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        made: dict[str, torch.Tensor] = {}
        errors = []
        for path, layer in self._layers.items():
            kept = max(1, layer.rank * rank // self.rank) if self._nested else min(rank, layer.rank)
            if self._nested:
                small = layer.first(kept)
            else:
                small, error = layer.update.closest(kept)
                errors.append(LayerError(path.removeprefix(PREFIX), error, layer.update.norm))
            wide, tall = small.padded(rank)
            made |= {f"{path}.lora_A.weight": wide.float(), f"{path}.lora_B.weight": (tall / usual).float()}
        others = {name: read_rows(entry) for name, entry in self._saved.tensors.items() if name not in made}
        save_file({**others, **made}, str(folder / WEIGHTS), metadata={"format": "pt"})
        write_object(folder / CONFIG, config)
        return errors

    def _config(self, rank: int) -> JsonObject:
        """One rank and one scale for all layers: that of the whole adapter, or alpha / rank of the first ranks."""
        config = self._saved.config
        alpha, r = config["lora_alpha"], config["r"]
        if not self._nested:
            share = rank / r
            alpha *= share**0.5 if config.get("use_rslora") else share
        return {**config, "r": rank, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}}


def _untrimmable(saved: AdapterFolder, why: str, todo: str = _ANEW) -> ModelError:
    return ModelError(f"cannot be given a smaller rank: {why}", file=str(saved.path), todo=todo)
