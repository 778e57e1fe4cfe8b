"""VeRA: two random matrices that all linears share stay frozen, and each linear has two trained vectors.

    W' = W + diag(b) B diag(d) A        A [r, in], B [out, r]: first rows and columns of the shared ones

b is zero at the start. The shared matrices are saved with the adapter, so that it is the same on every machine.

Source: Kopiczko et al. 2023, VeRA (https://arxiv.org/abs/2310.11454), equation 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import ModelError
from lorafit.kinds.adapter_parts import Rank, SavedField
from lorafit.kinds.adapters import adapters
from lorafit.kinds.adapters._linears import AtLinears, Change, LinearFolding
from lorafit.kinds.adapters._saved import named_on_disk, trained_values
from lorafit.kinds.folding import AdaptedLayer
from lorafit.kinds.linear_targets import LinearsSection

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from lorafit.facts import LinearShape


class VeraSection(LinearsSection):
    """Two trained vectors beside each frozen linear, around random matrices that all share."""

    kind: Literal["vera"] = "vera"
    """VeRA; it wants a larger learning rate than LoRA, e.g. 4e-3, and a larger rank."""
    r: int = Field(default=256, ge=1, le=4096)
    """Rank: width between the shared matrices."""
    first_d: float = Field(default=0.1, gt=0.0, le=10.0, allow_inf_nan=False)
    """What each value of d is at the start."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the adapter's inputs that is zeroed while training (0 to 1)."""
    projection_seed: int = Field(default=0, ge=0, le=2**31 - 1)
    """Decides the shared matrices."""


class VeraFolding(LinearFolding):
    """The sum with the product of the four."""

    parts: ClassVar[Mapping[str, str]] = {"vera_lambda_b": "b", "vera_lambda_d": "d"}
    shared: ClassVar[Mapping[str, str]] = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
    new_weight: ClassVar[str] = "W + diag(b) B diag(d) A"

    def features(self, layer: AdaptedLayer) -> tuple[int | None, int | None]:
        """Outputs are b's; as many inputs as A has, or fewer."""
        (outputs,), (rank,) = layer.tensors["b"].shape, layer.tensors["d"].shape
        a, b = layer.tensors["A"].shape, layer.tensors["B"].shape
        if a[0] != rank or b[1] != rank or b[0] < outputs:
            what = f"its vectors are of {outputs} and {rank} values, the shared matrices {list(b)} and {list(a)}"
            raise ModelError(what, todo="get the adapter again")
        return None, outputs

    def change(self, layer: AdaptedLayer) -> Change:
        """W + diag(b) B diag(d) A."""
        left, right = self._factors(layer)

        def change(weight: torch.Tensor, first: int) -> torch.Tensor:
            return weight.addmm(left[first : first + len(weight)], right[:, : weight.shape[1]])

        return change

    def product(self, layer: AdaptedLayer, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """diag(b) B diag(d), and so many columns of A."""
        left, right = self._factors(layer)
        return left, right[:, :inputs]

    def _factors(self, layer: AdaptedLayer) -> tuple[torch.Tensor, torch.Tensor]:
        b, d, left, right = (self.read(layer.tensors[part]) for part in ("b", "d", "B", "A"))
        return b[:, None] * left[: len(b)] * d, right


@adapters.register(VeraSection)
class Vera(AtLinears[VeraSection]):
    """PEFT's VeRA."""

    peft_type: ClassVar[str] = "VERA"
    usual_rate: ClassVar[float] = 20.0
    takes_transposed: ClassVar[bool] = True
    saved_fields: ClassVar[Mapping[str, SavedField]] = {
        "r": SavedField(Rank, "a whole number from 1", needed=True),
        "projection_prng_key": SavedField(int, "a whole number", needed=True),
        "save_projection": SavedField(bool, "true or false"),
        "vera_dropout": SavedField(Annotated[float, Field(ge=0, le=1)], "a number from 0 to 1"),
        "fan_in_fan_out": SavedField(bool, "true or false"),
    }
    recipe_fields: ClassVar[Mapping[str, str]] = {"r": "r", "projection_prng_key": "projection_seed"}
    fixed: ClassVar[JsonMapping] = {"save_projection": True}

    def layer_parameters(self, linear: LinearShape) -> int:
        """b and d."""
        return linear.out_features + self.section.r

    def options(self, target_modules: Sequence[str]) -> JsonObject:
        """Rank, first values, dropout, and what the shared matrices come from."""
        return {
            "r": self.section.r,
            "d_initial": self.section.first_d,
            "vera_dropout": self.section.dropout,
            "projection_prng_key": self.section.projection_seed,
            "save_projection": True,
        }

    @classmethod
    def live_tensors(cls, model: PeftModel, name: str) -> dict[str, torch.Tensor]:
        """The vectors, and the shared matrices."""
        saves = model.peft_config[name].save_projection
        shared = {f"base_model.vera_{part}.{name}": getattr(model.base_model, f"vera_{part}")[name] for part in "AB"}
        return named_on_disk(model, name, {**trained_values(model, name), **(shared if saves else {})})

    @classmethod
    def why_no_effect(cls, config: JsonMapping, nonzero_tensors: Set[str]) -> str | None:
        """b of zeros everywhere."""
        return None if any("vera_lambda_b" in name for name in nonzero_tensors) else "every vera_lambda_b is zero"

    @classmethod
    def folding(cls, config: JsonMapping) -> VeraFolding:
        """W + diag(b) B diag(d) A."""
        return VeraFolding(config, cls)
