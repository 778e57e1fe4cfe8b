"""What each switch of a recipe would save on the card, each alone, beside the recipe as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorafit.kinds.optimizers import optimizers
from lorafit.kinds.quantizations import quantizations
from lorafit.memory import fits
from lorafit.plan.step_memory import MemoryQuestion

if TYPE_CHECKING:
    from lorafit.facts import DeviceFacts
    from lorafit.memory import MemoryEstimate
    from lorafit.recipe.schema import Recipe

_LEAST_ROW_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Saving:
    """One switch.

    Attributes:
        switch: As a line of the recipe.
        fits: Whether the recipe would fit with it; None: no card was named.
        note: When the saving is not certain, why.
    """

    switch: str
    saved_bytes: int
    fits: bool | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Switch:
    """One thing that could be otherwise, and what the step would need then."""

    switch: str
    memory: MemoryEstimate
    leaves_bytes: int = 0
    note: str = ""


def find_savings(
    question: MemoryQuestion, tokens: int, checkpointing: bool, device: DeviceFacts | None, headroom: float
) -> tuple[Saving, ...]:
    """The switches that save something, the largest saving first."""
    now = question.at(tokens, checkpointing).needed_bytes
    found = []
    for other in (
        *_smaller_batches(question, tokens, checkpointing),
        *_smaller_weights(question, tokens, checkpointing),
        *_smaller_adapters(question, tokens, checkpointing),
        *_smaller_states(question, tokens, checkpointing),
    ):
        saved = now - other.memory.needed_bytes + other.leaves_bytes
        if saved > 0:
            enough = None if device is None else fits(other.memory, device.memory_bytes, headroom)
            found.append(Saving(other.switch, saved, enough, other.note))
    return tuple(sorted(found, key=lambda saving: -saving.saved_bytes))


def _smaller_batches(question: MemoryQuestion, tokens: int, checkpointing: bool) -> Iterator[_Switch]:
    longest = question.longest_tokens
    if not checkpointing:
        yield _Switch("training.gradient_checkpointing: true", question.at(tokens, True))
    if tokens > longest:
        yield _Switch(f"training.micro_batch_tokens: {longest}", question.at(longest, checkpointing))
    half = longest // 2
    if half >= _LEAST_ROW_TOKENS:
        shorter = replace(
            question,
            longest_tokens=half,
            longest_trained_tokens=min(question.longest_trained_tokens, half),
        )
        yield _Switch(f"data.max_length: {half}", shorter.at(max(half, tokens // 2), checkpointing))


def _smaller_weights(question: MemoryQuestion, tokens: int, checkpointing: bool) -> Iterator[_Switch]:
    section = question.recipe.model.quantization
    if question.shape.linears and section.kind not in ("nf4", "fp4"):
        nf4 = quantizations.make_section("nf4")
        changed = _with(question, "model", quantization=nf4)
        yield _Switch("model.quantization: nf4", changed.at(tokens, checkpointing))
    if getattr(section, "double_quant", True) is False:
        changed = _with(question, "model", quantization=section.model_copy(update={"double_quant": True}))
        yield _Switch("model.quantization.double_quant: true", changed.at(tokens, checkpointing))
    if question.keeps_unpacked:
        unpacking = replace(question, keeps_unpacked=False)
        yield _Switch("model.quantization.keep_unpacked: false", unpacking.at(tokens, checkpointing))


def _smaller_adapters(question: MemoryQuestion, tokens: int, checkpointing: bool) -> Iterator[_Switch]:
    adapter = question.recipe.adapter
    rank = getattr(adapter, "r", 1)
    if rank > 1:
        yield _Switch(f"adapter.r: {rank // 2}", _with(question, "adapter", r=rank // 2).at(tokens, checkpointing))
    named = [x.name for x in question.shape.linears if x.role in ("q", "v", "qkv") and not x.left_out]
    attention = list(dict.fromkeys(named))
    if attention and hasattr(adapter, "target_modules"):
        changed = _with(question, "adapter", target_modules=attention)
        yield _Switch(f"adapter.target_modules: [{', '.join(attention)}]", changed.at(tokens, checkpointing))
    if getattr(adapter, "dropout", 0.0) > 0:
        yield _Switch("adapter.dropout: 0", _with(question, "adapter", dropout=0.0).at(tokens, checkpointing))


def _smaller_states(question: MemoryQuestion, tokens: int, checkpointing: bool) -> Iterator[_Switch]:
    now = optimizers.bind(question.recipe.training.optimizer)
    if not question.recipe.training.optimizer.kind.endswith("8bit"):
        changed = _with(question, "training", optimizer=optimizers.make_section("adamw_8bit"))
        yield _Switch("training.optimizer: adamw_8bit", changed.at(tokens, checkpointing))
    if question.device_kind == "cuda" and not now.is_paged:
        changed = _with(question, "training", optimizer=optimizers.make_section("paged_adamw_8bit"))
        memory = changed.at(tokens, checkpointing)
        leaves = round(memory.paged_bytes * (memory.needed_bytes - memory.context_bytes) / memory.tensor_bytes)
        yield _Switch("training.optimizer: paged_adamw_8bit", memory, leaves, "once its state has left the card")


def _with(question: MemoryQuestion, section: str, **changes: Any) -> MemoryQuestion:
    changed: Recipe = question.recipe.model_copy(
        update={section: getattr(question.recipe, section).model_copy(update=changes)}
    )
    return replace(question, recipe=changed)
