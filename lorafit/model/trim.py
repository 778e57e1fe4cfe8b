"""A smaller rank for a trained adapter, by its factors alone: no matrix of a weight's size is made.

s B A = Q_B (R_B R_A^T) Q_A^T s      QR of B [out, r] and of A^T [in, r]
R_B R_A^T = U S V^T                  [r, r]: its singular values times s are those of the update

by SVD      the k largest: no other update of rank k is closer (Eckart and Young 1936), and what is left out is
            sqrt of the sum of the other squares
nested      the first k ranks as they are, scaled by alpha / k: what DyLoRA trained at k
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from lorafit.contracts import JsonObject
from lorafit.errors import ModelError
from lorafit.files.atomic import MANIFEST
from lorafit.files.safetensors import TensorEntry, read_rows
from lorafit.model.adapter import CONFIG, WEIGHTS, AdapterFolder, write_object
from lorafit.model.low_rank import PREFIX, read_low_rank

_ANEW = "train anew with that rank"


@dataclass(frozen=True, slots=True)
class LayerError:
    """What a smaller rank leaves out of one layer's update.

    Attributes:
        layer: Its path.
        error: Frobenius norm of the difference.
        update: That of the whole update.
    """

    layer: str
    error: float
    update: float

    @property
    def share(self) -> float:
        """error / update, 0 to 1."""
        return self.error / self.update if self.update else 0.0


class _Layer:
    """One layer's factors in fp64, and its singular values.

    Args:
        factors: Entries of A and B.
        scaling: s.
    """

    def __init__(self, factors: Mapping[str, TensorEntry], scaling: float) -> None:
        self.a, self.b = (read_rows(factors[part]).double() for part in "AB")
        self.scaling, self.rank = scaling, self.a.shape[0]

    @cached_property
    def _singular(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Left vectors, values of s B A, right vectors."""
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(self.b), torch.linalg.qr(self.a.T)
        u, values, v = torch.linalg.svd(r_b @ r_a.T)
        return q_b @ u, values * self.scaling, v @ q_a.T

    def closest(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A and B of that rank whose product is closest to the update, and how far it is."""
        left, values, right = self._singular
        root = values[:rank].sqrt()
        return root[:, None] * right[:rank], left[:, :rank] * root, float(values[rank:].norm())

    def first(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first ranks with the scale that they were trained with."""
        return self.a[:rank], self.b[:, :rank] * (self.scaling * self.rank / rank)

    @cached_property
    def norm(self) -> float:
        """Of the update."""
        return float(self._singular[1].norm())


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
                a, b = layer.first(kept)
            else:
                a, b, error = layer.closest(kept)
                errors.append(LayerError(path.removeprefix(PREFIX), error, layer.norm))
            wide, tall = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
            wide[:kept], tall[:, :kept] = a, b / usual
            made |= {f"{path}.lora_A.weight": wide.float(), f"{path}.lora_B.weight": tall.float()}
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
