"""One question to the memory estimate: a recipe's kinds and sections bound to a shape and a longest row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafit.errors import RecipeError
from lorafit.kinds.adapters import adapters
from lorafit.kinds.optimizers import optimizers
from lorafit.kinds.quantizations import quantizations
from lorafit.memory import MemoryEstimate, estimate, fits, labels_of

if TYPE_CHECKING:
    from lorafit.facts import DeviceFacts, ModelShape
    from lorafit.recipe.schema import Recipe

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class MemoryQuestion:
    """What one training step of a recipe holds, by micro-batch and checkpointing.

    Attributes:
        longest_tokens: Tokens of the longest row.
        longest_trained_tokens: Most trained tokens in one row.
        dtype: `bf16`, `fp16` or `fp32`.
        attention: `eager` or any that keeps no scores.
        keeps_unpacked: Whether adapted 4-bit weights keep their dequantised copy; `decide_unpacked` settles it.
    """

    recipe: Recipe
    shape: ModelShape
    longest_tokens: int
    longest_trained_tokens: int
    dtype: str
    attention: str
    device_kind: str
    keeps_unpacked: bool = False

    def at(self, micro_batch_tokens: int, checkpointing: bool) -> MemoryEstimate:
        """The estimate for one size of micro-batch."""
        model, training, adapter = self.recipe.model, self.recipe.training, self.recipe.adapter
        tokens = max(micro_batch_tokens, self.longest_tokens)
        return estimate(
            self.shape,
            quantization=quantizations.bind(model.quantization),
            adapter=adapters.bind(adapter),
            optimizer=optimizers.bind(training.optimizer),
            dtype_bytes=DTYPE_BYTES[self.dtype],
            micro_batch_tokens=tokens,
            longest_tokens=self.longest_tokens,
            labels=self.labels_at(tokens),
            gradient_checkpointing=checkpointing,
            attention=self.attention,
            device_kind=self.device_kind,
            packed=self.packs_rows,
            keeps_unpacked=self.keeps_unpacked,
        )

    @property
    def packs_rows(self) -> bool:
        """Whether a mask keeps several documents of a row apart; a variable-length kernel needs none."""
        return self.recipe.data.packing and not self.attention.startswith("flash_attention")

    def labels_at(self, tokens: int) -> int:
        """Most labels of so many padded tokens; packed rows may be full of trained ones."""
        return (
            tokens if self.recipe.data.packing else labels_of(tokens, self.longest_tokens, self.longest_trained_tokens)
        )

    def largest_tokens(self, checkpointing: bool, most_tokens: int, device_bytes: int, headroom: float) -> int | None:
        """The most tokens, from one longest row up to `most_tokens`, that fit; None where not even that row does.

        Maximal: one token more does not fit by the same estimate, or is more than `most_tokens`.
        """
        return find_largest(
            lambda tokens: fits(self.at(tokens, checkpointing), device_bytes, headroom),
            self.longest_tokens,
            max(most_tokens, self.longest_tokens),
        )


def find_largest(holds: Callable[[int], bool], least: int, most: int) -> int | None:
    """The largest of `least` to `most` that holds; None where not even `least` does.

    Maximal whatever the shape of `holds`: the next value was seen not to hold, or is beyond `most`.
    """
    if not holds(least):
        return None
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def resolve_dtype(asked: str, device: DeviceFacts | None) -> str:
    """`auto`: bf16 where the device computes it at speed (and where no device is named), else fp16 on a GPU, fp32 on
    a CPU."""
    if asked != "auto":
        return asked
    if device is None or device.bf16:
        return "bf16"
    return "fp32" if device.kind == "cpu" else "fp16"


def resolve_compute_dtype(recipe: Recipe, dtype: str) -> str:
    """Of products with dequantised weights; `auto` and kinds without the choice: the model's."""
    asked = getattr(recipe.model.quantization, "compute_dtype", "auto")
    return dtype if asked == "auto" else str(asked)


def estimated_attention(recipe: Recipe, shape: ModelShape) -> str:
    """What an estimate assumes for `auto`: sdpa, or eager where the model leaves no choice.

    Raises:
        RecipeError: The model's soft-cap on attention scores needs eager attention, and the recipe names sdpa or
            fused.
    """
    asked = recipe.model.attention
    if shape.softcap and asked in ("sdpa", "fused"):
        raise RecipeError(
            f"{asked} cannot apply the soft-cap that {shape.model_type} puts on attention scores",
            key="model.attention",
            todo="write eager, flash_attention_2 or auto",
        )
    if asked == "auto":
        return "eager" if shape.softcap or shape.no_sdpa else "sdpa"
    return asked
