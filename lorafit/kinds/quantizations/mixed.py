"""Linears of several kinds in one model: by their names, the last parts of their paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from lorafit.console.nearest import did_you_mean
from lorafit.errors import RecipeError
from lorafit.kinds.quantizations import Quantization, QuantizationSection, quantizations
from lorafit.kinds.quantizations._several import Several

if TYPE_CHECKING:
    from lorafit.facts import LinearShape, ModelShape


class MixedSection(QuantizationSection):
    """Frozen linear weights, each in a kind of its own."""

    kind: Literal["mixed"] = "mixed"
    """A kind for each linear, by name."""
    linears: dict[str, str] = Field(default={})
    """`{linear: kind}`, e.g. `{down_proj: int8, o_proj: none}`: how linears of that name are stored."""
    others: str = "nf4"
    """The kind of all other linears."""
    double_quant: bool = True
    """Quantise the constants of 4-bit linears too."""

    @field_validator("linears", "others")
    @classmethod
    def _kinds_are_known(cls, value: dict[str, str] | str) -> dict[str, str] | str:
        known = [name for name, kind in quantizations.items() if not issubclass(kind, Several)]
        for name in [value] if isinstance(value, str) else value.values():
            if name not in known:
                hint = did_you_mean(name, known)
                raise ValueError(f"'{name}' is no kind of a linear; {hint}known: {', '.join(known)}")
        return value


@quantizations.register(MixedSection)
class Mixed(Several[MixedSection]):
    """A kind for each name."""

    keeps_inputs: ClassVar[bool] = False
    before_names: ClassVar[str] = r"(?:.*\.)?"

    @property
    def told(self) -> Mapping[str, str]:
        """By name."""
        return self.section.linears

    @property
    def others(self) -> str:
        """The section's."""
        return self.section.others

    @property
    def double_quant(self) -> bool:
        """The section's."""
        return self.section.double_quant

    def of(self, path: str) -> Quantization[QuantizationSection]:
        """The kind of the last part's name, else that of all others."""
        return self.kinds.get(path.rsplit(".", 1)[-1], self.kind_of_others)

    def check(self, shape: ModelShape) -> None:
        """Raises RecipeError where a name is none of the model's linears."""
        known = sorted({linear.name for linear in shape.linears})
        for name in self.section.linears:
            if name not in known:
                todo = f"{did_you_mean(name, known)}available: {', '.join(known)}"
                what = f"'{name}' matches no linear of this model"
                raise RecipeError(what, key="model.quantization.linears", todo=todo)

    def weight_bytes(self, linear: LinearShape, dtype_bytes: int) -> int:
        """Of the linear's own kind."""
        return self.of(linear.name).weight_bytes(linear, dtype_bytes)

    def constant_bytes(self, linear: LinearShape) -> int:
        """Of the linear's own kind."""
        return self.of(linear.name).constant_bytes(linear)

    def workspace_bytes(self, largest: LinearShape, dtype_bytes: int) -> int:
        """Of the linear's own kind."""
        return self.of(largest.name).workspace_bytes(largest, dtype_bytes)
