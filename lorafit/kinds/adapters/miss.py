"""MiSS: one block of r rows is added to a frozen weight again and again, until its inputs are used up.

    W'[o, j] = W[o, j] + D[j mod r, o]        D [r, out] is trained, and zero at the start

So the inputs are summed by their place in a block of r before the one product with D.

Source: Kang & Yin 2024, MiSS (https://arxiv.org/abs/2409.15371), section 3.2, of which `expand(D)` is this W' - W.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import RecipeError
from lorafit.kinds.adapter_parts import Rank, SavedField
from lorafit.kinds.adapters import adapters
from lorafit.kinds.adapters._linears import AtLinears, Change, LinearFolding
from lorafit.kinds.folding import AdaptedLayer
from lorafit.kinds.linear_targets import LinearsSection

if TYPE_CHECKING:
    import torch

    from lorafit.facts import LinearShape


class MissSection(LinearsSection):
    """One trained block, repeated along the inputs of frozen linears."""

    kind: Literal["miss"] = "miss"
    """MiSS."""
    r: int = Field(default=64, ge=1, le=4096)
    """Rows of the block; at most as many as the linear has inputs."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the adapter's inputs that is zeroed while training (0 to 1)."""


class MissFolding(LinearFolding):
    """The block added at every r inputs."""

    parts: ClassVar[Mapping[str, str]] = {"miss_block": "D"}
    new_weight: ClassVar[str] = "W + expand(D)"

    def features(self, layer: AdaptedLayer) -> tuple[int | None, int | None]:
        """Outputs are D's columns."""
        return None, layer.tensors["D"].shape[-1]

    def change(self, layer: AdaptedLayer) -> Change:
        """W + expand(D)."""
        added = self.read(layer.tensors["D"]).t()

        def change(weight: torch.Tensor, first: int) -> torch.Tensor:
            rows, inputs = weight.shape
            times = -(-inputs // added.shape[1])
            return weight + added[first : first + rows].repeat(1, times)[:, :inputs]

        return change

    def product(self, layer: AdaptedLayer, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """D^T, and the unit rows one behind the other."""
        import torch

        left = self.read(layer.tensors["D"]).t()
        ranks = left.shape[1]
        return left, torch.eye(ranks, dtype=left.dtype).repeat(1, -(-inputs // ranks))[:, :inputs]


@adapters.register(MissSection)
class Miss(AtLinears[MissSection]):
    """PEFT's MiSS in its usual form; of a stranger's, `bat` and `mini` are opened, and not merged."""

    peft_type: ClassVar[str] = "MISS"
    saved_fields: ClassVar[Mapping[str, SavedField]] = {
        "r": SavedField(Rank, "a whole number from 1", needed=True),
        "miss_dropout": SavedField(Annotated[float, Field(ge=0, le=1)], "a number from 0 to 1"),
        "init_weights": SavedField(bool | Literal["bat", "mini"], "true, false, bat or mini"),
    }
    recipe_fields: ClassVar[Mapping[str, str]] = {"r": "r"}
    form_fields: ClassVar[Sequence[str]] = (*AtLinears.form_fields, "init_weights")
    fixed: ClassVar[JsonMapping] = {"init_weights": True}

    def layer_parameters(self, linear: LinearShape) -> int:
        """D: r x out."""
        if self.section.r > linear.in_features:
            what = f"{self.section.r} is more than the {linear.in_features} inputs of '{linear.name}'"
            raise RecipeError(what, key="adapter.r", todo=f"choose at most {linear.in_features}")
        return self.section.r * linear.out_features

    def options(self, target_modules: Sequence[str]) -> JsonObject:
        """r and dropout."""
        return {"r": self.section.r, "miss_dropout": self.section.dropout}

    @classmethod
    def why_no_effect(cls, config: JsonMapping, nonzero_tensors: Set[str]) -> str | None:
        """A block of zeros everywhere."""
        return None if any("miss_block" in name for name in nonzero_tensors) else "every miss_block is zero"

    @classmethod
    def folding(cls, config: JsonMapping) -> MissFolding:
        """W + expand(D)."""
        return MissFolding(config, cls)
