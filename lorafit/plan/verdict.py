"""`lorafit estimate-memory`: a recipe's memory without rows, without weights and without a GPU; and what would save
some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorafit.devices import format_bytes
from lorafit.errors import DoesNotFitError
from lorafit.kinds.adapters import adapters
from lorafit.kinds.optimizers import optimizers
from lorafit.kinds.quantizations import quantizations
from lorafit.memory import MemoryEstimate, fits
from lorafit.plan.question import MemoryQuestion, estimated_attention, resolve_dtype

if TYPE_CHECKING:
    from rich.console import Console

    from lorafit.recipe.schema import Recipe
    from lorafit.shapes import DatasetFacts, DeviceFacts, ModelShape


@dataclass(frozen=True, slots=True)
class Saving:
    """What one switch of the recipe would save on the card."""

    switch: str
    saved_bytes: int


@dataclass(frozen=True)
class RecipeEstimate:
    """The answer of `estimate-memory`.

    Attributes:
        longest_tokens: Tokens of the row that was assumed.
        rows_known: Whether that is the longest row of the data; else it is data.max_length.
        device: The card that was asked about; None: none.
        savings: Switches that would save memory, the largest first.
    """

    name: str
    model: str
    memory: MemoryEstimate
    dtype: str
    quantization: str
    longest_tokens: int
    rows_known: bool
    total_parameters: int
    trainable_parameters: int
    device: DeviceFacts | None
    headroom: float
    savings: tuple[Saving, ...]

    @property
    def fits(self) -> bool | None:
        """Whether it fits on the card; None where no card was named."""
        return None if self.device is None else fits(self.memory, self.device.memory_bytes, self.headroom)

    def render(self, console: Console) -> None:
        """The table for people."""
        from lorafit.plan.render import estimate_table

        console.print(estimate_table(self))

    def raise_unless_fits(self) -> None:
        """For `--gpu`.

        Raises:
            DoesNotFitError: It does not fit.
        """
        if self.device is not None and self.fits is False:
            best = f"; largest saving: {self.savings[0].switch}" if self.savings else ""
            raise DoesNotFitError(
                f"does not fit: needs {format_bytes(self.memory.needed_bytes)}, {self.device.name} has "
                f"{format_bytes(self.device.memory_bytes)}, of which {self.headroom:.0%} stay free{best}",
                key="--gpu",
                todo="take a larger card or a switch of the table",
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values, sizes in bytes."""
        return {
            "name": self.name,
            "model": self.model,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "longest_tokens": self.longest_tokens,
            "rows_known": self.rows_known,
            "total_parameters": self.total_parameters,
            "trainable_parameters": self.trainable_parameters,
            "memory": self.memory.to_json(),
            "gpu": None
            if self.device is None
            else {"name": self.device.name, "memory_bytes": self.device.memory_bytes},
            "headroom": self.headroom,
            "fits": self.fits,
            "savings": [{"switch": saving.switch, "saved_bytes": saving.saved_bytes} for saving in self.savings],
        }


def estimate_recipe(
    recipe: Recipe,
    shape: ModelShape,
    dataset: DatasetFacts | None = None,
    device: DeviceFacts | None = None,
    headroom: float = 0.05,
) -> RecipeEstimate:
    """The memory of a recipe.

    Where micro_batch_tokens is `auto`, one longest row is assumed; where gradient_checkpointing is, none, unless the
    card needs it.

    Args:
        dataset: Facts of the real rows; None: a row of data.max_length, of which every token may carry loss.
        device: The card of `--gpu`; None: no verdict.

    Raises:
        RecipeError: The adapter's targets match nothing, or sdpa was asked of a model with a soft-cap.
    """
    longest = dataset.longest_tokens if dataset else min(recipe.data.max_length, shape.max_positions)
    question = MemoryQuestion(
        recipe=recipe,
        shape=shape,
        longest_tokens=longest,
        longest_trained_tokens=dataset.longest_trained_tokens if dataset else longest,
        dtype=resolve_dtype(recipe.model.dtype, device),
        attention=estimated_attention(recipe, shape),
        device_kind=device.kind if device else "cuda",
    )
    asked = recipe.training.micro_batch_tokens
    tokens = longest if asked == "auto" else int(asked)
    checkpointing = recipe.training.gradient_checkpointing
    if checkpointing == "auto":
        plain = question.at(tokens, False)
        checkpointing = device is not None and not fits(plain, device.memory_bytes, headroom)
    memory = question.at(tokens, bool(checkpointing))
    adapter = adapters.get(recipe.adapter.kind)
    targets = adapter.targets(recipe.adapter, shape)
    return RecipeEstimate(
        name=recipe.name,
        model=recipe.model.base,
        memory=memory,
        dtype=question.dtype,
        quantization=recipe.model.quantization.kind,
        longest_tokens=longest,
        rows_known=dataset is not None,
        total_parameters=shape.total_parameters,
        trainable_parameters=sum(adapter.trainable_parameters(recipe.adapter, linear) for linear in targets),
        device=device,
        headroom=headroom,
        savings=_savings(question, tokens, bool(checkpointing), memory),
    )


def _savings(question: MemoryQuestion, tokens: int, checkpointing: bool, now: MemoryEstimate) -> tuple[Saving, ...]:
    """Each switch alone, beside the recipe as it is."""
    recipe, found = question.recipe, []

    def try_switch(
        switch: str, changed: Recipe, *, at: int = tokens, checkpoint: bool = checkpointing, longest: int = 0
    ) -> None:
        rows = longest or question.longest_tokens
        asked = MemoryQuestion(
            changed, question.shape, rows, min(question.longest_trained_tokens, rows), question.dtype,
            question.attention, question.device_kind,
        )  # fmt: skip
        saved = now.needed_bytes - asked.at(at, checkpoint).needed_bytes
        if saved > 0:
            found.append(Saving(switch, saved))

    if not checkpointing:
        try_switch("training.gradient_checkpointing: true", recipe, checkpoint=True)
    if tokens > question.longest_tokens:
        smallest = question.longest_tokens
        try_switch(f"training.micro_batch_tokens: {smallest}", recipe, at=smallest)
    half = question.longest_tokens // 2
    if half >= 8:
        try_switch(f"data.max_length: {half}", recipe, at=max(half, tokens // 2), longest=half)
    quantization = recipe.model.quantization
    if quantization.kind != "nf4" and question.shape.linears:
        nf4 = quantizations.get("nf4").section()
        try_switch("model.quantization: nf4", _with(recipe, "model", quantization=nf4))
    elif getattr(quantization, "double_quant", True) is False:
        double = quantization.model_copy(update={"double_quant": True})
        try_switch("model.quantization.double_quant: true", _with(recipe, "model", quantization=double))
    if not recipe.training.optimizer.kind.endswith("8bit"):
        eight_bit = optimizers.get("adamw_8bit").section()
        try_switch("training.optimizer: adamw_8bit", _with(recipe, "training", optimizer=eight_bit))
    adapter = recipe.adapter
    rank = getattr(adapter, "r", 1)
    if rank > 1:
        halved = adapter.model_copy(update={"r": rank // 2})
        try_switch(f"adapter.r: {rank // 2}", recipe.model_copy(update={"adapter": halved}))
    attention = [linear.name for linear in question.shape.linears if linear.role in ("q", "v", "qkv")]
    if attention and hasattr(adapter, "target_modules"):
        fewer = adapter.model_copy(update={"target_modules": attention})
        try_switch(f"adapter.target_modules: [{', '.join(attention)}]", recipe.model_copy(update={"adapter": fewer}))
    if getattr(adapter, "dropout", 0.0) > 0:
        without = adapter.model_copy(update={"dropout": 0.0})
        try_switch("adapter.dropout: 0", recipe.model_copy(update={"adapter": without}))
    return tuple(sorted(found, key=lambda saving: -saving.saved_bytes))


def _with(recipe: Recipe, section: str, **changes: Any) -> Recipe:
    changed: Recipe = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=changes)})
    return changed
