"""NF4, 8 bits or none for each linear: the better kinds where calibration rows say that they count, within a budget.

gradient of the loss at each weight ──x error of each kind──> what the kind changes the loss by, linear by linear
                                     ──knapsack──> the kinds that together raise it the least, at so many bits a weight

Bits are all that is stored of a linear, its constants included: with double quantisation NF4 has 4 + 8/64 +
32/(64 x 256) = 4.127 and 8.7 kbit of tables a linear, int8 8 + 32/in, and a plain weight those of model.dtype.

Source: first-order Taylor expansion of the loss, L(w + e) - L(w) = g e + O(e^2), with e = rounded(w) - w.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, NoReturn, get_args

from pydantic import Field, model_validator

from lorafit.console.nearest import did_you_mean
from lorafit.console.wording import list_names
from lorafit.errors import RecipeError
from lorafit.facts import LinearShape
from lorafit.kinds.quantizations import (
    Quantization,
    QuantizationSection,
    Sensitivity,
    kind_of_codes,
    quantizations,
)
from lorafit.kinds.quantizations._knapsack import choose
from lorafit.kinds.quantizations._several import Several, make_single

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lorafit.facts import ModelShape

SingleKind = Literal["nf4", "int8", "none"]
KINDS: tuple[SingleKind, ...] = get_args(SingleKind)
_MOST_BITS = 16.0
_KEY = "model.quantization.linears"


class AdaptiveSection(QuantizationSection):
    """Frozen linear weights in the kinds that cost the least loss within a budget of bits."""

    kind: Literal["adaptive"] = "adaptive"
    """NF4, 8 bits or none for each linear, by what calibration rows say."""
    bits: float = Field(default=5.0, le=_MOST_BITS)
    """Mean bits a weight of the linears, constants included: at most so many."""
    calibration_rows: int = Field(default=64, ge=1)
    """Training rows, evenly spaced over the prepared set, whose loss is asked, once, before the base is quantised."""
    double_quant: bool = True
    """Quantise the constants of 4-bit linears too."""
    linears: dict[str, SingleKind] = Field(default={})
    """`{path: kind}` of every linear, as a run's card.json has it: nothing is asked then."""

    @property
    def least_bits(self) -> float:
        """Of NF4, tables apart."""
        return 4 + 8 / 64 + 32 / (64 * 256) if self.double_quant else 4 + 32 / 64

    @model_validator(mode="after")
    def _holds_four_bits(self) -> AdaptiveSection:
        if self.bits < (least := self.least_bits):
            raise ValueError(
                f"bits: {self.bits:g} is less than NF4 alone takes: about {least:.3f}, by the widths of the model's "
                f"linears; at most {_MOST_BITS:g}"
            )
        return self


@quantizations.register(AdaptiveSection)
class Adaptive(Several[AdaptiveSection]):
    """A kind for each path."""

    keeps_inputs: ClassVar[bool] = False
    before_names: ClassVar[str] = ""
    others: ClassVar[str] = "nf4"

    @property
    def told(self) -> Mapping[str, str]:
        """By path."""
        return self.section.linears

    @property
    def double_quant(self) -> bool:
        """The section's."""
        return self.section.double_quant

    def single_kinds(self) -> Sequence[str]:
        """Those that were chosen; all of them before that."""
        return tuple(dict.fromkeys(self.told.values())) or KINDS

    def of(self, path: str) -> Quantization[QuantizationSection]:
        """The kind that the path was given; all together where it names no single linear."""
        return self.kinds.get(path, self)

    @cached_property
    def _singles(self) -> dict[str, Quantization[QuantizationSection]]:
        return {kind: make_single(kind, double_quant=self.double_quant) for kind in KINDS}

    def candidates(self) -> Mapping[str, Quantization[QuantizationSection]]:
        """All kinds, until each linear has one."""
        return {} if self.told else self._singles

    @property
    def calibration_rows(self) -> int:
        """The section's."""
        return self.section.calibration_rows

    def told_by(self, linears: Mapping[str, str]) -> AdaptiveSection:
        """The section with these kinds, where it has none of its own."""
        if self.told or not linears:
            return self.section
        return AdaptiveSection.model_validate({**self.section.model_dump(), "linears": dict(linears)})

    def allot(self, found: Sequence[Sensitivity], dtype_bytes: int) -> list[str]:
        """The knapsack's."""
        costs = [{kind: self._stored_bytes(kind, one.linear, dtype_bytes) for kind in one.changes} for one in found]
        weights = sum(one.linear.weight_parameters for one in found)
        self._check_budget(sum(min(cost.values()) for cost in costs), weights)
        return choose(costs, [one.changes for one in found], int(self.section.bits * weights / 8))

    def _stored_bytes(self, kind: str, linear: LinearShape, dtype_bytes: int) -> int:
        single = self._singles[kind]
        return single.weight_bytes(linear, dtype_bytes) + single.constant_bytes(linear)

    def _check_budget(self, least_bytes: int, weights: int) -> None:
        least = 8 * least_bytes / max(1, weights)
        if least > self.section.bits:
            what = (
                f"{self.section.bits:g} bits a weight are less than the {least:.3f} that the linears take at the least"
            )
            raise RecipeError(what, key="model.quantization.bits", todo=f"write {least + 0.001:.3f} or more")

    def check(self, shape: ModelShape) -> None:
        """Raises RecipeError where the budget is too small, or a path ends with the name of none of the linears."""
        linears = [linear for linear in shape.linears if linear.quantizable]
        if not self.told:
            least = sum(min(self._stored_bytes(kind, linear, 2) for kind in KINDS) for linear in linears)
            self._check_budget(least, sum(linear.weight_parameters for linear in linears))
        known = sorted({linear.name for linear in linears})
        for path in self.told:
            if (name := path.rsplit(".", 1)[-1]) not in known:
                _refuse(path, f"{did_you_mean(name, known)}its linears: {', '.join(known)}")

    def weight_bytes(self, linear: LinearShape, dtype_bytes: int) -> int:
        """Of the kinds that linears of the name were given; before that, what the budget lets all of them take."""
        if not self.told:
            return int(self.section.bits * linear.weight_parameters / 8)
        return self._sum(linear, lambda kind, one: kind.weight_bytes(one, dtype_bytes))

    def constant_bytes(self, linear: LinearShape) -> int:
        """Of those kinds; before that the budget holds them."""
        return self._sum(linear, lambda kind, one: kind.constant_bytes(one))

    def _sum(self, linear: LinearShape, size: Callable[[Quantization[QuantizationSection], LinearShape], int]) -> int:
        kinds, one = self._kinds_of(linear), replace(linear, count=1)
        named = max(1, kinds.total())
        return sum(size(self._singles[kind], one) * count * linear.count // named for kind, count in kinds.items())

    def _kinds_of(self, linear: LinearShape) -> Counter[str]:
        return Counter(kind for path, kind in self.told.items() if path.rsplit(".", 1)[-1] == linear.name)

    def share_keeping_inputs(self, linear: LinearShape) -> float:
        """Those in 8 bits; before they are known, as many as the budget pays for, in every layer alike."""
        kinds = self._kinds_of(linear)
        if self.told:
            return kinds["int8"] / max(1, kinds.total())
        least = self.section.least_bits
        return min(1.0, (self.section.bits - least) / (8 - least))

    def workspace_bytes(self, largest: LinearShape, dtype_bytes: int) -> int:
        """The dequantised copy of one weight."""
        return largest.in_features * largest.out_features * dtype_bytes

    def replace_linears(self, model: PreTrainedModel, compute_dtype: torch.dtype, skip_modules: Sequence[str]) -> None:
        """By the chosen kinds; before they are known, by some that use the budget up."""
        told = self.told or self._spend_budget(model, skip_modules)
        super(Adaptive, Adaptive(self.told_by(told))).replace_linears(model, compute_dtype, skip_modules)

    def quantise_rest(self, model: PreTrainedModel, compute_dtype: torch.dtype, skip_modules: Sequence[str]) -> None:
        """Raises RecipeError where a path is none of the model's, or a linear of it has no kind."""
        modules = dict(model.named_modules())
        for path in self.told.keys() - modules.keys():
            _refuse(path, "take the linears of a run on this base, or leave them out")
        untold = [path for path, module in modules.items() if kind_of_codes(module) and path not in self.told]
        if untold:
            what = f"says nothing of {list_names(untold)}"
            raise RecipeError(what, key=_KEY, todo="name every linear, or none to have all of them chosen")
        super().quantise_rest(model, compute_dtype, skip_modules)

    def _spend_budget(self, model: PreTrainedModel, skip_modules: Sequence[str]) -> dict[str, str]:
        """Kinds of a model without values, as if each weight counted the same."""
        from torch.nn import Linear
        from transformers.pytorch_utils import Conv1D
        from transformers.quantizers.quantizers_utils import should_convert_module

        found = []
        for path, module in model.named_modules():
            if type(module) in (Linear, Conv1D) and should_convert_module(path, list(skip_modules)):
                writes, reads = module.weight.shape
                changes = {"nf4": 1.0 * writes * reads, "int8": 0.01 * writes * reads, "none": 0.0}
                found.append(Sensitivity(path, LinearShape(path, reads, writes, 1), changes))
        return dict(zip((one.path for one in found), self.allot(found, 2), strict=True))


def _refuse(path: str, todo: str) -> NoReturn:
    raise RecipeError(f"'{path}' is no linear of this model that can be quantised", key=_KEY, todo=todo)
