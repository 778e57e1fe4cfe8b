"""Linears of several kinds in one model: what every quantisation shares that mixes others.

most linears        ──> others      loaded by transformers, as if it were the only kind
those that are told ──> their own   loaded plain, and quantised behind that, a linear at a time
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from lorafit.contracts import JsonValue
from lorafit.kinds.quantizations import Quantization, QuantizationSection, quantizations
from lorafit.kinds.registry import S_co

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin


def make_single(kind: str, *, double_quant: bool) -> Quantization[QuantizationSection]:
    """A kind of single linears, with the one option that all of them may share."""
    has_constants = "double_quant" in quantizations.section(kind).model_fields
    options: dict[str, JsonValue] = {"double_quant": double_quant} if has_constants else {}
    return quantizations.make(kind, **options)


class Several(Quantization[S_co]):
    """A kind for each linear that is told of, and one for all others.

    Attributes:
        before_names: What may stand in a path before what a linear is told by, as a regular expression.
    """

    is_quantized: ClassVar[bool] = True
    before_names: ClassVar[str]

    @property
    @abstractmethod
    def told(self) -> Mapping[str, str]:
        """Kinds by what their linears are told by: names, or paths."""

    @property
    @abstractmethod
    def others(self) -> str:
        """The kind of all other linears."""

    @property
    @abstractmethod
    def double_quant(self) -> bool:
        """Whether the constants of 4-bit linears are quantised too."""

    @cached_property
    def kind_of_others(self) -> Quantization[QuantizationSection]:
        """The kind of all other linears, made."""
        return make_single(self.others, double_quant=self.double_quant)

    @cached_property
    def kinds(self) -> dict[str, Quantization[QuantizationSection]]:
        """What is told, each kind made once."""
        made = {
            kind: make_single(kind, double_quant=self.double_quant) for kind in set(self.told.values()) - {self.others}
        }
        return {name: made.get(kind, self.kind_of_others) for name, kind in self.told.items()}

    def single_kinds(self) -> Sequence[str]:
        """Every kind that the section names."""
        return (self.others, *self.told.values())

    def transformers_config(
        self, compute_dtype: torch.dtype, skip_modules: Sequence[str]
    ) -> QuantizationConfigMixin | None:
        """That of all others, which leaves out the linears of another kind."""
        apart = [name for name, kind in self.kinds.items() if kind is not self.kind_of_others]
        return self.kind_of_others.transformers_config(compute_dtype, [*skip_modules, *self._paths_of(apart)])

    def replace_linears(self, model: PreTrainedModel, compute_dtype: torch.dtype, skip_modules: Sequence[str]) -> None:
        """By each kind, which is told to skip the linears of all others."""
        self._replace(model, compute_dtype, skip_modules, {self.kind_of_others, *self.kinds.values()})

    def quantise_rest(self, model: PreTrainedModel, compute_dtype: torch.dtype, skip_modules: Sequence[str]) -> None:
        """The linears of other kinds than that of all others: replaced, and each given the weight of the plain one."""
        before = dict(model.named_modules())
        self._replace(model, compute_dtype, skip_modules, set(self.kinds.values()) - {self.kind_of_others})
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
            own = [name for name, of_name in self.kinds.items() if of_name is kind]
            apart = [name for name in self.kinds if name not in own]
            others = (
                self._paths_of(apart)
                if kind is self.kind_of_others
                else [rf"(?!{self.before_names}(?:{_either(own)})$).*"]
            )
            kind.replace_linears(model, compute_dtype, [*skip_modules, *others])
            found = {mark: found[mark] or bool(getattr(model, mark, False)) for mark in marks}
        for mark in marks:
            setattr(model, mark, found[mark])

    def _paths_of(self, names: Sequence[str]) -> list[str]:
        """The paths of what is told by the names, as transformers reads patterns; none for no name."""
        return [rf"{self.before_names}(?:{_either(names)})$"] if names else []


def _either(names: Sequence[str]) -> str:
    return "|".join(map(re.escape, names))


def _take_weight(layer: Any, plain: Any) -> None:
    """Quantises a loaded linear's weight for the layer that takes its place, as transformers does while it loads."""
    weight, empty = plain.weight.data, layer.weight
    value = weight.t().contiguous() if layer.source_cls.__name__ == "Conv1D" else weight
    options = {name: held for name, held in vars(empty).items() if name not in ("CB", "SCB")}
    # bitsandbytes quantises a weight that arrives from the CPU
    layer.weight = type(empty)(value.to("cpu"), requires_grad=False, **options).to(weight.device)
    layer.bias = plain.bias
    layer.train(plain.training)
