"""How the frozen base weights are stored, each linear by a kind of its own.

file of the base ──loading──> codes and constants ──prove──> quantization.json (hashes, and the kind, by tensor)
                 ──rebuild──> the same ones, some rows at a time, proven by those hashes: what a merge adds to
skeleton ──replace_linears──> layers without values ──fake──> fake tensors of the size of codes and constants
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.kinds.registry import Kind, S_co, SectionRegistry
from lorafit.kinds.section import KindSection

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import nn
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from lorafit.facts import LinearShape, ModelShape
    from lorafit.files.safetensors import AnyEntry

ComputeDtype = Literal["auto", "bf16", "fp16", "fp32"]
KeepUnpacked = bool | Literal["auto"]


class QuantizationSection(KindSection):
    """What every quantisation's section has."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What storing one linear in each of several kinds would change the loss by.

    Attributes:
        path: Of the linear.
        linear: Its sizes, with a count of 1.
        changes: Of the loss, by kind, for the kinds that it can be stored in.
    """

    path: str
    linear: LinearShape
    changes: Mapping[str, float]


class Rows(Protocol):
    """A weight in the orientation of the base's files, read a stretch of rows at a time."""

    def read(self, start: int, stop: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """Rows `start` to `stop`: `[stop - start, ...]`; `into`, where it fits."""


class RebuiltRows(Rows, Protocol):
    """A quantised weight made again, its values as training saw them."""

    @property
    def proof(self) -> JsonMapping:
        """What `Packed.prove` would note of it."""


class Quantization(Kind[S_co]):
    """One way to store the frozen linear weights.

    Attributes:
        keeps_inputs: Whether its linears keep their input for the backward pass, out of checkpointing's reach.
        cpu_row_multiple: On a CPU, linears whose rows are no multiple of so many weights stay unquantised.
    """

    is_quantized: ClassVar[bool]
    keeps_inputs: ClassVar[bool]
    cpu_row_multiple: ClassVar[int] = 1

    @abstractmethod
    def weight_bytes(self, linear: LinearShape, dtype_bytes: int) -> int:
        """Bytes of the codes (or of the plain weights) of all `linear.count` weights."""

    @abstractmethod
    def constant_bytes(self, linear: LinearShape) -> int:
        """Bytes of the quantisation constants of all `linear.count` weights."""

    @abstractmethod
    def workspace_bytes(self, largest: LinearShape, dtype_bytes: int) -> int:
        """Bytes of the temporary that one forward or backward of the largest linear needs (its dequantised copy)."""

    def of(self, path: str) -> Quantization[KindSection]:
        """How the linear of that path is stored, or those that its last part alone names: by this kind, unless it mixes
        several.
        """
        return self

    def share_keeping_inputs(self, linear: LinearShape) -> float:
        """Of the `linear.count` linears, the share that keeps its input out of checkpointing's reach."""
        return float(self.keeps_inputs)

    def candidates(self) -> Mapping[str, Quantization[KindSection]]:
        """The kinds among which each linear's is to be chosen, by what each changes the loss by; none where the section
        says them all.
        """
        return {}

    @property
    def calibration_rows(self) -> int:
        """Of how many training rows the loss is asked, to choose among the candidates."""
        return 0

    def allot(self, found: Sequence[Sensitivity], dtype_bytes: int) -> Sequence[str]:
        """The kind of each linear, chosen among its candidates.

        Raises:
            RecipeError: What the section allows is less than the linears take at the least.
        """
        raise NotImplementedError

    def told_by(self, linears: Mapping[str, str]) -> S_co:
        """The section with the kinds of linears by path that a run has chosen, where it leaves them open."""
        return self.section

    def single_kinds(self) -> Sequence[str]:
        """The kinds that single linears may be stored in: this one, unless it mixes several."""
        return (self.section.kind,)

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """What a plain weight `[out, in]` is once it was stored so."""
        return weight

    def check(self, shape: ModelShape) -> None:
        """Raises RecipeError where the section names a linear that the model has not."""

    def transformers_config(
        self, compute_dtype: torch.dtype, skip_modules: Sequence[str]
    ) -> QuantizationConfigMixin | None:
        """What `from_pretrained(quantization_config=)` gets; None for plain weights."""
        return None

    def replace_linears(self, model: PreTrainedModel, compute_dtype: torch.dtype, skip_modules: Sequence[str]) -> None:
        """Puts layers of the kind, without values, where loading would put them into a model on the meta device."""

    def quantise_rest(self, model: PreTrainedModel, compute_dtype: torch.dtype, skip_modules: Sequence[str]) -> None:
        """Quantises, in a loaded model, what transformers has not; it knows one kind a model."""


class Packed(Quantization[S_co]):
    """One that holds codes in the place of weights; its classmethods take live layers, and notes of a run."""

    is_quantized: ClassVar[bool] = True

    @classmethod
    def name(cls) -> str:
        """What quantization.json calls it."""
        return next(name for name, kind in quantizations.items() if kind is cls)

    @classmethod
    @abstractmethod
    def holds(cls, layer: nn.Module) -> bool:
        """Whether a layer's weight is one of this kind; with values, without, or fake."""

    @classmethod
    @abstractmethod
    def prove(cls, layer: nn.Module) -> JsonObject:
        """Shape, and hashes of codes and constants, of a loaded layer's weight; never of dequantised values."""

    @classmethod
    def settle(cls, layer: nn.Module) -> None:
        """Puts a loaded layer right where libraries go wrong, e.g. where a device gives other codes than a CPU."""

    @classmethod
    @abstractmethod
    def rebuild(cls, entry: AnyEntry, used: JsonMapping, proof: JsonMapping) -> RebuiltRows:
        """A weight made again from the base's file.

        Args:
            entry: In the file.
            used: The run's quantization.json.
            proof: What `prove` noted of it, with `transposed` for a weight that lies `[in, out]`.
        """

    @classmethod
    @abstractmethod
    def fake(cls, layer: nn.Module) -> nn.Parameter:
        """A weight of the size that loading would give, for a layer on the meta device; under a FakeTensorMode."""

    @classmethod
    @abstractmethod
    def unpack(cls, layer: nn.Module) -> torch.Tensor:
        """[out, in] of a layer's weight; without values where it has none."""


quantizations: SectionRegistry[Quantization[QuantizationSection]] = SectionRegistry(
    "quantization", "lorafit.kinds.quantizations"
)


def packed_kind(name: str) -> type[Packed[QuantizationSection]] | None:
    """The kind of that name, where it holds codes."""
    kind = quantizations.get(name) if name in quantizations.names() else None
    return kind if kind is not None and issubclass(kind, Packed) else None


def kind_of_codes(layer: nn.Module) -> type[Packed[QuantizationSection]] | None:
    """The kind that holds a layer's weight as codes; None for plain weights."""
    kinds = map(packed_kind, quantizations.names())
    return next((kind for kind in kinds if kind is not None and kind.holds(layer)), None)
