"""What the methods share that stand at frozen linears and have a weight of their own shape at each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import ModelError
from lorafit.files.safetensors import read_rows
from lorafit.kinds.adapter_parts import Site
from lorafit.kinds.adapters import Adapter
from lorafit.kinds.folding import AdaptedLayer, Fold, Folding
from lorafit.kinds.linear_targets import LinearsSection, choose_linears

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

    from lorafit.facts import LinearShape, ModelShape
    from lorafit.files.safetensors import TensorEntry

_TENSORS_KEPT = 4  # those of one layer, and two that all layers share

Change = Callable[["torch.Tensor", int], "torch.Tensor"]
"""New weights of some outputs, of the old ones `[outputs, in]` in fp64 and the number of the first output."""
Factors = Callable[[int], "tuple[torch.Tensor, torch.Tensor] | None"]
"""Left `[rows, r]` and right `[r, columns]` of what is added, fp64, by the weight's columns."""

L_co = TypeVar("L_co", bound=LinearsSection, covariant=True)


class AtLinears(Adapter[L_co]):
    """PEFT's layer of the method in the place of each linear, its own values in fp32.

    Attributes:
        takes_transposed: Whether PEFT's layer also stands at weights that lie `[in, out]`, as GPT-2's.
        fixed: Keys of adapter_config.json that a recipe cannot set, with the values that lorafit trains with; an
            adapter with another value is opened as PEFT computes it, and is not merged.
    """

    starts_as_base: ClassVar[bool] = True
    takes_transposed: ClassVar[bool] = False
    form_fields: ClassVar[Sequence[str]] = ("modules_to_save", "bias", "layers_to_transform")
    fixed: ClassVar[JsonMapping] = {}

    def sites(self, shape: ModelShape) -> tuple[Site, ...]:
        """The linears it goes on. Raises RecipeError where a name matches none, or one does not take the options."""
        return tuple(
            Site("linear", linear.name, linear.count, self.layer_parameters(linear) * linear.count, linear)
            for linear in choose_linears(self.section, shape)
        )

    @abstractmethod
    def layer_parameters(self, linear: LinearShape) -> int:
        """Trained parameters at one linear. Raises RecipeError where it does not take the recipe's options."""

    @abstractmethod
    def options(self, target_modules: Sequence[str]) -> JsonObject:
        """Keys of PEFT's config beside targets and orientation, for these targets."""

    def peft_config(self, target_modules: Sequence[str], *, is_transposed: bool) -> PeftConfig:
        """PEFT's config class of the type. Raises ModelError where PEFT's layer takes no such weights."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        if is_transposed and not self.takes_transposed:
            what = f"{self.section.kind} stands at weights that lie [out, in], and this model's lie [in, out]"
            raise ModelError(what, key="adapter.kind", todo="use lora, dora, vera or ia3")
        options = self.options(target_modules)
        if self.takes_transposed:
            options["fan_in_fan_out"] = is_transposed
        made: PeftConfig = PEFT_TYPE_TO_CONFIG_MAPPING[self.peft_type](target_modules=list(target_modules), **options)
        return made


class LinearFolding(Folding):
    """How the tensors of one method at a linear become its new weight.

    Args:
        config: adapter_config.json.

    Raises:
        ModelError: It uses what the method's kind does not compute.
    """

    def __init__(self, config: JsonMapping, method: type[AtLinears[Any]]) -> None:
        odd = [f"{key}={config[key]}" for key, value in method.fixed.items() if config.get(key, value) != value]
        odd += [] if config.get("bias", "none") == "none" else [f"bias={config['bias']}"]
        odd += [key for key in ("modules_to_save",) if config.get(key)]
        if odd:
            raise ModelError(f"cannot be merged: it uses {', '.join(odd)}", todo="merge it with the tool that made it")
        self.config = config
        self.read = lru_cache(maxsize=_TENSORS_KEPT)(_read_fp64)

    def shape(self, layer: AdaptedLayer) -> tuple[int | None, int | None]:
        """By `features`, in the orientation of the files.

        Raises:
            ModelError: The tensors do not go together.
        """
        if layer.matrices != 1:
            raise ModelError("is no linear: several matrices are stacked in its weight")
        inputs, outputs = self.features(layer)
        return (inputs, outputs) if layer.transposed else (outputs, inputs)

    @abstractmethod
    def features(self, layer: AdaptedLayer) -> tuple[int | None, int | None]:
        """Width of a layer's input and of its output as its tensors tell; None for what they do not tell.

        Raises:
            ModelError: They do not go together.
        """

    @abstractmethod
    def change(self, layer: AdaptedLayer) -> Change:
        """From the old weight of some outputs to the new one."""

    def product(self, layer: AdaptedLayer, inputs: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Left `[out, r]` and right `[r, in]` whose product is added to any weight; None where none is."""
        return None

    def fold(
        self, layer: AdaptedLayer, matrix: int, first_row: int, stop_row: int, read: Callable[[int, int], torch.Tensor]
    ) -> DenseFold:
        """By `change`; a weight that lies `[in, out]` is read and changed as a whole.

        Raises:
            ModelError: It lies so, in several tensors.
        """
        change = self.change(layer)
        if not layer.transposed:

            def factors(columns: int) -> tuple[torch.Tensor, torch.Tensor] | None:
                made = self.product(layer, columns)
                return made and (made[0][first_row:stop_row], made[1])

            return DenseFold(lambda weight, first: change(weight, first_row + first), factors)
        inputs = self.features(layer)[0]
        if first_row != 0 or inputs not in (None, stop_row):
            raise ModelError("a weight that lies [in, out] cannot be merged where it is several tensors")
        whole = change(read(0, stop_row).double().t(), 0).t()
        return DenseFold(lambda weight, first: whole[first : first + len(weight)])


class DenseFold(Fold):
    """A new weight that is any function of the rows of the old one, computed in fp64 and rounded once.

        |written - exact| <= u |exact| + 2^-44 ||row of W|| + smallest      u: the dtype's unit roundoff

    The second term is more than fp64 leaves of sums over a row; it matters where they cancel to nearly zero.

    Args:
        change: From rows of the weight, fp64, and the number of the first of them, to the new ones.
        factors: See `Fold.factors`, by the weight's columns.
    """

    def __init__(self, change: Change, factors: Factors = lambda columns: None) -> None:
        self._change, self._factors = change, factors

    def apply(self, weight: torch.Tensor, first_row: int, out: torch.Tensor) -> None:
        """`out` becomes the changed weight; see `Fold`."""
        out.copy_(self._change(weight.double(), first_row))

    def error(self, weight: torch.Tensor, written: torch.Tensor, first_row: int) -> float:
        """The largest error over its bound; see `Fold`."""
        import torch

        wide, limits = weight.double(), torch.finfo(written.dtype)
        exact = self._change(wide, first_row)
        sums = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).mul_(2.0**-44)
        bound = exact.abs().mul_(limits.eps / 2).add_(sums).add_(max(limits.smallest_normal * limits.eps, 2.0**-126))
        return float(exact.sub_(written.double()).abs_().div_(bound).max())

    def update(self, weight: torch.Tensor, first_row: int) -> torch.Tensor:
        """The new rows less the old ones; see `Fold`."""
        wide = weight.double()
        return self._change(wide, first_row) - wide

    def factors(self, columns: int | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """By the method, where it adds the same to any weight; see `Fold`."""
        return None if columns is None else self._factors(columns)


def _read_fp64(entry: TensorEntry) -> torch.Tensor:
    return read_rows(entry).double()
