"""What the methods share that train parameters of the model itself: in copies of its layers, by PEFT's LN_TUNING.

    layer ─┬─ frozen, as loaded      computes with the adapter off
           └─ trained copy           computes else, with fp32 parameters that are rounded to the base's dtype for it

So the base stays there to be compared with, a merge writes what computed, and plain PEFT opens the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeVar

from lorafit.contracts import JsonMapping
from lorafit.errors import ModelError
from lorafit.files.safetensors import read_rows
from lorafit.kinds.adapters import Adapter, AdapterSection
from lorafit.kinds.adapters._saved import head_values
from lorafit.kinds.folding import AdaptedLayer, Fold, Folding

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel

_PART = "copy"


class CopyFold(Fold):
    """Rows of a trained parameter in the place of the base's.

    Args:
        rows: In fp32.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows

    def apply(self, weight: torch.Tensor, first_row: int, out: torch.Tensor) -> None:
        """Rounds them once."""
        out.copy_(self._rows[first_row : first_row + len(weight)])

    def error(self, weight: torch.Tensor, written: torch.Tensor, first_row: int) -> float:
        """0 where each is the rounded value; else more than its bound."""
        wanted = self._rows[first_row : first_row + len(weight)].to(written.dtype)
        return 0.0 if bool((wanted == written).all()) else float("inf")

    def update(self, weight: torch.Tensor, first_row: int) -> torch.Tensor:
        """The rows less the base's; see `Fold`."""
        return self._rows[first_row : first_row + len(weight)].double() - weight.double()


class CopyFolding(Folding):
    """Trained parameters take the place of the base's."""

    parts: ClassVar[Mapping[str, str]] = {_PART: _PART}
    copies: ClassVar[str] = "ln_tuning_layers"
    new_weight: ClassVar[str] = "a trained copy of W"

    def shape(self, layer: AdaptedLayer) -> tuple[int, int]:
        """The parameter's own; of a vector each value is a row."""
        entry = layer.tensors[_PART].as_matrix()
        return entry.rows, entry.row_elements

    def fold(
        self, layer: AdaptedLayer, matrix: int, first_row: int, stop_row: int, read: Callable[[int, int], torch.Tensor]
    ) -> CopyFold:
        """The rows themselves."""
        return CopyFold(read_rows(layer.tensors[_PART].as_matrix().rows_between(first_row, stop_row)).float())


C_co = TypeVar("C_co", bound=AdapterSection, covariant=True)


class Copies(Adapter[C_co]):
    """Trained copies of layers beside the frozen ones."""

    starts_as_base: ClassVar[bool] = True
    saved_as: ClassVar[str | None] = "layer_norm"
    peft_type: ClassVar[str] = "LN_TUNING"

    def peft_config(self, target_modules: Sequence[str], *, is_transposed: bool) -> PeftConfig:
        """PEFT's LNTuningConfig, which takes layers of any kind."""
        from peft import LNTuningConfig

        return LNTuningConfig(target_modules=list(target_modules))

    def settle(self, model: PeftModel) -> None:
        """Trains them in fp32."""
        from lorafit.ops.trained_copies import train_in_fp32

        train_in_fp32(model, model.active_adapter)

    @classmethod
    def reopen(cls, model: PeftModel, name: str, tensors: Collection[str]) -> None:
        """Ties what the base ties; of layers of which the bias alone was trained, that is all."""
        from lorafit.ops.trained_copies import LAYERS, keep_only, tie_copies

        keep_only(model, name, lambda path, own: f"{path}.{LAYERS}.{own}" in tensors)
        tie_copies(model, name)

    @classmethod
    def live_tensors(cls, model: PeftModel, name: str) -> dict[str, torch.Tensor]:
        """Each trained parameter at the first layer that has it, and a task's own head."""
        own = {path: value for path, value, is_first in _copied(model, name) if is_first}
        return {**own, **head_values(model, name)}

    @classmethod
    def derived_tensors(cls, model: PeftModel, name: str) -> dict[str, torch.Tensor]:
        """Those that other layers share, once more for each of these: PEFT ties no copies."""
        return {path: value.detach().clone() for path, value, is_first in _copied(model, name) if not is_first}

    @classmethod
    def folding(cls, config: JsonMapping) -> Folding:
        """Parameters in the place of the base's.

        Raises:
            ModelError: It saves modules in another way beside them.
        """
        if config.get("modules_to_save"):
            what = "cannot be merged: it saves modules whole beside its copies of layers"
            raise ModelError(what, todo="merge it with the tool that made it")
        return CopyFolding()


def _copied(model: PeftModel, name: str) -> list[tuple[str, torch.Tensor, bool]]:
    """Trained parameters by their names on disk, and whether none before is the same."""
    from lorafit.ops.trained_copies import LAYERS, copied_layers, own_parameters

    found, seen = list[tuple[str, "torch.Tensor", bool]](), set[int]()
    for path, layer in copied_layers(model, name):
        for own, value in own_parameters(getattr(layer, LAYERS)[name]).items():
            found.append((f"{path}.{LAYERS}.{own}", value, id(value) not in seen))
            seen.add(id(value))
    return found
