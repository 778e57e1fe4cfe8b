"""OFT: the inputs of a frozen linear are turned, a block of them at a time, by a trained rotation.

    W' = W diag(R_1, ..., R_n)^T        R = (I - Q) (I + Q)^-1, Q = -Q^T

Q has b (b - 1) / 2 trained values, zero at the start. Angles and lengths within a block stay as they are. `neumann`
takes (I + Q) (I - Q)^-1 as a series of five terms, which is faster, and a rotation only where Q is small.

Source: Qiu et al. 2023, OFT (https://arxiv.org/abs/2306.07280), section 3.2; the series: Qiu et al. 2025
(https://arxiv.org/abs/2506.19847), equation 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import ModelError, RecipeError
from lorafit.kinds.adapter_parts import SavedField
from lorafit.kinds.adapters import adapters
from lorafit.kinds.adapters._linears import AtLinears, Change, LinearFolding
from lorafit.kinds.folding import AdaptedLayer
from lorafit.kinds.linear_targets import LinearsSection

if TYPE_CHECKING:
    import torch

    from lorafit.facts import LinearShape

_TERMS = 5
"""PEFT's default length of the series."""


class OftSection(LinearsSection):
    """Rotations of the inputs of frozen linears, block by block."""

    kind: Literal["oft"] = "oft"
    """OFT; it wants a smaller learning rate than LoRA, e.g. 1e-4."""
    block_size: int = Field(default=32, ge=2, le=1024)
    """Inputs that one rotation turns; must divide the inputs of every target."""
    cayley: Literal["exact", "neumann"] = "exact"
    """How a rotation is made of its values: solved for, or by a short series, faster and not quite orthogonal."""


class OftFolding(LinearFolding):
    """Rows of the weight turned block by block."""

    parts: ClassVar[Mapping[str, str]] = {"oft_R": "R"}
    new_weight: ClassVar[str] = "W R^T, R a rotation"

    def features(self, layer: AdaptedLayer) -> tuple[int | None, int | None]:
        """Inputs are the blocks' own."""
        blocks, values = layer.tensors["R"].shape
        size = (1 + math.isqrt(1 + 8 * values)) // 2
        if size * (size - 1) // 2 != values:
            raise ModelError(f"has {values} values a block, which no rotation is made of", todo="get the adapter again")
        return blocks * size, None

    def change(self, layer: AdaptedLayer) -> Change:
        """Each row by the blocks of its inputs."""
        rotations = self._rotations(self.read(layer.tensors["R"]))
        count, size, _ = rotations.shape

        def change(weight: torch.Tensor, first: int) -> torch.Tensor:
            blocks = weight.view(len(weight), count, size).transpose(0, 1)
            return (blocks @ rotations.mT).transpose(0, 1).reshape(weight.shape)

        return change

    def _rotations(self, values: torch.Tensor) -> torch.Tensor:
        """R of each block: `[blocks, b, b]`."""
        import torch

        size = (1 + math.isqrt(1 + 8 * values.shape[1])) // 2
        upper = torch.zeros(len(values), size, size, dtype=values.dtype)
        upper[:, *torch.triu_indices(size, size, 1)] = values
        skew, one = upper - upper.mT, torch.eye(size, dtype=values.dtype)
        if not self.config.get("use_cayley_neumann", True):
            solved: torch.Tensor = torch.linalg.solve(one + skew, one - skew, left=False)
            return solved
        powers = [one, skew, skew @ skew, skew @ skew @ skew, skew @ skew @ skew @ skew]
        return powers[0] + 2 * powers[1] + 2 * powers[2] + 2 * powers[3] + powers[4]


@adapters.register(OftSection)
class Oft(AtLinears[OftSection]):
    """PEFT's OFT; of a stranger's, shared blocks, constrained ones and other series are opened, and not merged."""

    peft_type: ClassVar[str] = "OFT"
    usual_rate: ClassVar[float] = 0.3  # Source: docs/compare.md, "Nine methods on one base"
    saved_fields: ClassVar[Mapping[str, SavedField]] = {
        "oft_block_size": SavedField(int, "a whole number", needed=True),
        "r": SavedField(int, "a whole number"),
        "use_cayley_neumann": SavedField(bool, "true or false"),
        "num_cayley_neumann_terms": SavedField(int, "a whole number"),
    }
    recipe_fields: ClassVar[Mapping[str, str]] = {
        "oft_block_size": "block_size",
        "use_cayley_neumann": "cayley",
    }
    form_fields: ClassVar[Sequence[str]] = (*AtLinears.form_fields, "coft", "block_share")
    fixed: ClassVar[JsonMapping] = {"coft": False, "block_share": False, "num_cayley_neumann_terms": _TERMS}

    def layer_parameters(self, linear: LinearShape) -> int:
        """b (b - 1) / 2 for each block of inputs."""
        size = self.section.block_size
        if linear.in_features % size:
            what = f"{size} does not divide the {linear.in_features} inputs of '{linear.name}'"
            fits = [n for n in range(2, 257) if linear.in_features % n == 0]
            raise RecipeError(what, key="adapter.block_size", todo=f"choose one of {', '.join(map(str, fits[:12]))}")
        return linear.in_features * (size - 1) // 2

    def options(self, target_modules: Sequence[str]) -> JsonObject:
        """Size of a block, and how rotations are made."""
        return {
            "r": 0,
            "oft_block_size": self.section.block_size,
            "use_cayley_neumann": self.section.cayley == "neumann",
            "num_cayley_neumann_terms": _TERMS,
        }

    @classmethod
    def why_no_effect(cls, config: JsonMapping, nonzero_tensors: Set[str]) -> str | None:
        """Rotations by nothing."""
        return None if any("oft_R" in name for name in nonzero_tensors) else "every rotation is by nothing"

    @classmethod
    def folding(cls, config: JsonMapping) -> OftFolding:
        """W R^T."""
        return OftFolding(config, cls)
