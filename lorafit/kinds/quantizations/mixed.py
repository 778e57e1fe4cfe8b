"""Linears of several kinds in one model: by their names, the last parts of their paths.

q_proj, k_proj, ... ──> others      loaded by transformers, as if it were the only kind
down_proj           ──> int8        loaded plain, and quantised behind that, a linear at a time
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from lorafit.console.nearest import did_you_mean
from lorafit.contracts import JsonValue
from lorafit.errors import RecipeError
from lorafit.kinds.quantizations import Quantization, QuantizationSection, quantizations

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from lorafit.facts import LinearShape, ModelShape

_KIND = "mixed"


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
        known = [name for name in quantizations.names() if name != _KIND]
        for name in [value] if isinstance(value, str) else value.values():
            if name not in known:
                hint = did_you_mean(name, known)
                raise ValueError(f"'{name}' is no kind of a linear; {hint}known: {', '.join(known)}")
        return value


@quantizations.register(MixedSection)
class Mixed(Quantization[MixedSection]):
    """A kind for each name."""

    is_quantized: ClassVar[bool] = True
    keeps_inputs: ClassVar[bool] = False

    @cached_property
    def _others(self) -> Quantization[QuantizationSection]:
        return self._bound(self.section.others)

    @cached_property
    def _by_name(self) -> dict[str, Quantization[QuantizationSection]]:
        made = {kind: self._bound(kind) for kind in set(self.section.linears.values()) - {self.section.others}}
        return {name: made.get(kind, self._others) for name, kind in self.section.linears.items()}

    def _bound(self, kind: str) -> Quantization[QuantizationSection]:
        has_constants = "double_quant" in quantizations.section(kind).model_fields
        options: dict[str, JsonValue] = {"double_quant": self.section.double_quant} if has_constants else {}
        return quantizations.make(kind, **options)

    def of(self, name: str) -> Quantization[QuantizationSection]:
        """The kind of that name, else that of all others."""
        return self._by_name.get(name, self._others)

    def single_kinds(self) -> Sequence[str]:
        """Every kind that the section names."""
        return (self.section.others, *self.section.linears.values())

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

    def transformers_config(
        self, compute_dtype: torch.dtype, skip_modules: Sequence[str]
    ) -> QuantizationConfigMixin | None:
        """That of all others, which leaves out the linears of another kind."""
        apart = [name for name, kind in self._by_name.items() if kind is not self._others]
        return self._others.transformers_config(compute_dtype, [*skip_modules, *_paths_of(apart)])

    def replace_linears(self, model: PreTrainedModel, compute_dtype: torch.dtype, skip_modules: Sequence[str]) -> None:
        """By each kind, which is told to skip the linears of all others."""
        self._replace(model, compute_dtype, skip_modules, {self._others, *self._by_name.values()})

    def quantise_rest(self, model: PreTrainedModel, compute_dtype: torch.dtype, skip_modules: Sequence[str]) -> None:
        """The linears of other kinds than that of all others: replaced, and each given the weight of the plain one."""
        before = dict(model.named_modules())
        self._replace(model, compute_dtype, skip_modules, set(self._by_name.values()) - {self._others})
        for path, module in model.named_modules():
            plain: Any = before.pop(path)
            if plain is not module:
                _take_weight(module, plain)

    def _replace(
        self,
        model: PreTrainedModel,
        compute_dtype: torch.dtype,
        skip_modules: Sequence[str],
        kinds: set[Quantization[QuantizationSection]],
    ) -> None:
        marks = ("is_loaded_in_4bit", "is_loaded_in_8bit")  # PEFT asks for them, and each kind sets both to its own
        found = {mark: bool(getattr(model, mark, False)) for mark in marks}
        for kind in sorted(kinds, key=lambda kind: kind.section.kind):
            own = [name for name, of_name in self._by_name.items() if of_name is kind]
            apart = [name for name in self._by_name if name not in own]
            others = _paths_of(apart) if kind is self._others else [rf"(?!(?:.*\.)?(?:{_either(own)})$).*"]
            kind.replace_linears(model, compute_dtype, [*skip_modules, *others])
            found = {mark: found[mark] or bool(getattr(model, mark, False)) for mark in marks}
        for mark in marks:
            setattr(model, mark, found[mark])


def _either(names: Sequence[str]) -> str:
    return "|".join(map(re.escape, names))


def _paths_of(names: Sequence[str]) -> list[str]:
    """The paths that end with one of the names, as transformers reads patterns; none for no name."""
    return [rf"(?:.*\.)?(?:{_either(names)})$"] if names else []


def _take_weight(layer: Any, plain: Any) -> None:
    """Quantises a loaded linear's weight for the layer that takes its place, as transformers does while it loads."""
    weight, empty = plain.weight.data, layer.weight
    value = weight.t().contiguous() if layer.source_cls.__name__ == "Conv1D" else weight
    options = {name: held for name, held in vars(empty).items() if name not in ("CB", "SCB")}
    # bitsandbytes quantises a weight that arrives from the CPU
    layer.weight = type(empty)(value.to("cpu"), requires_grad=False, **options).to(weight.device)
    layer.bias = plain.bias
    layer.train(plain.training)
