"""IA3: each output of a frozen linear is scaled by a trained number, or each input where it ends a feed-forward block.

    W' = diag(l) W, b' = l b        of a linear in `feedforward`: W' = W diag(l)        l is one at the start

Source: Liu et al. 2022, T-Few (https://arxiv.org/abs/2205.05638), section 3.3, equation 1 and what follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import ModelError
from lorafit.kinds.adapter_parts import SavedField
from lorafit.kinds.adapters import adapters
from lorafit.kinds.adapters._linears import AtLinears, Change, DenseFold, LinearFolding
from lorafit.kinds.folding import AdaptedLayer, Fold
from lorafit.kinds.linear_targets import LinearsSection

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from lorafit.facts import LinearShape

_ENDS_OF_BLOCKS = ["down_proj", "fc2", "fc_out", "w2", "wo", "dense_4h_to_h"]


class Ia3Section(LinearsSection):
    """A trained scale for each output of frozen linears, or for each input."""

    kind: Literal["ia3"] = "ia3"
    """IA3. The paper's targets are keys, values and the end of the feed-forward block: [k_proj, v_proj, down_proj]."""
    feedforward: list[str] = _ENDS_OF_BLOCKS
    """Names of the targets whose inputs are scaled instead of their outputs; names that are no targets say nothing."""


class Ia3Folding(LinearFolding):
    """Rows or columns of the weight scaled, and the bias where the outputs are."""

    parts: ClassVar[Mapping[str, str]] = {"ia3_l": "l"}
    new_weight: ClassVar[str] = "diag(l) W, or W diag(l)"

    def features(self, layer: AdaptedLayer) -> tuple[int | None, int | None]:
        """`[out, 1]`, or `[1, in]`."""
        shape = layer.tensors["l"].shape
        if len(shape) != 2 or min(shape) != 1:
            raise ModelError(f"its scales are {list(shape)}, which no row or column is", todo="get the adapter again")
        return (shape[1], None) if self._scales_inputs(layer) else (None, shape[0])

    def _scales_inputs(self, layer: AdaptedLayer) -> bool:
        return layer.tensors["l"].shape[0] == 1

    def change(self, layer: AdaptedLayer) -> Change:
        """The product with l along the axis that it belongs to."""
        scales = self.read(layer.tensors["l"]).reshape(-1)
        if self._scales_inputs(layer):
            return lambda weight, first: weight * scales
        return lambda weight, first: weight * scales[first : first + len(weight), None]

    def fold_bias(self, layer: AdaptedLayer, first_row: int, stop_row: int) -> Fold | None:
        """l b; none where the inputs are scaled."""
        if self._scales_inputs(layer):
            return None
        own = self.read(layer.tensors["l"]).reshape(-1)[first_row:stop_row]
        return DenseFold(lambda bias, first: bias * own[first : first + len(bias)])


def _in_dtype_of_input(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output.to(inputs[0].dtype)


@adapters.register(Ia3Section)
class Ia3(AtLinears[Ia3Section]):
    """PEFT's IA3."""

    peft_type: ClassVar[str] = "IA3"
    usual_rate: ClassVar[float] = 15.0
    starts_as_base: ClassVar[bool] = False  # beside codes PEFT computes the base's own product in fp32
    takes_transposed: ClassVar[bool] = True
    saved_fields: ClassVar[Mapping[str, SavedField]] = {
        "feedforward_modules": SavedField(str | list[str] | None, "a text or a list of texts"),
        "fan_in_fan_out": SavedField(bool, "true or false"),
    }

    def layer_parameters(self, linear: LinearShape) -> int:
        """A scale for each output, or for each input."""
        return linear.in_features if linear.name in self.section.feedforward else linear.out_features

    def options(self, target_modules: Sequence[str]) -> JsonObject:
        """Which targets have their inputs scaled."""
        ends = self.section.feedforward
        return {"feedforward_modules": [name for name in target_modules if name.rpartition(".")[2] in ends]}

    @classmethod
    def mend(cls, model: PeftModel) -> None:
        """Beside codes PEFT's layer answers in fp32 whatever it is asked in, and attention takes no such mixture."""
        for layer in model.modules():
            if hasattr(layer, "ia3_l") and not layer._forward_hooks:
                layer.register_forward_hook(_in_dtype_of_input)

    @classmethod
    def folding(cls, config: JsonMapping) -> Ia3Folding:
        """diag(l) W or W diag(l)."""
        return Ia3Folding(config, cls)
