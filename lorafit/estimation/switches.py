"""What could be otherwise in a recipe, so that it needs less memory: one list, for the table and for flags to paste.

A switch has a price, dearest last; cheap is what costs little speed and no quality:

    1   optimizer in 8 bits; quantised constants; no unpacked copies; one row a micro-batch
    2   gradient checkpointing (about a third slower)
    3   no dropout in the adapter
    5   4-bit weights (a little quality, less speed)
    6   half the rank
    8   an adapter on the attention's queries and values alone
    12  shorter rows: what is longer is cut, dropped or an error
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lorafit.contracts import JsonValue
from lorafit.kinds.optimizers import optimizers
from lorafit.kinds.quantizations import quantizations
from lorafit.memory import StepMemory, StepShape

LEAST_ROW_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Switch:
    """One change of a recipe.

    Attributes:
        key: Of the recipe.
        value: As the recipe writes it.
        price: See the module; None: its saving is not certain, and `note` says why.
        on: Gives a recipe's step with it.
    """

    key: str
    value: str
    price: int | None
    on: Callable[[StepMemory], StepMemory]
    note: str = ""

    @property
    def line(self) -> str:
        """As a line of the recipe."""
        return f"{self.key}: {self.value}"

    @property
    def flag(self) -> str:
        """As the command line has it."""
        flag = f"{self.key}={self.value}"
        return f"--set '{flag}'" if "[" in flag else f"--set {flag}"


def switches(now: StepMemory, checkpointing: bool) -> Iterator[Switch]:
    """Everything that could be otherwise, shorter rows apart.

    Args:
        now: The recipe's step.
        checkpointing: Whether layers are checkpointed as things are.
    """
    step = now.step
    if not step.optimizer.section.kind.endswith("8bit"):
        yield _optimizer("adamw_8bit", 1)
    if step.device_kind == "cuda" and not step.optimizer.is_paged:
        yield _optimizer("paged_adamw_8bit", None, "once its state has left the card")
    if now.least_tokens > step.row_tokens:
        row = str(step.row_tokens)
        yield Switch("training.micro_batch_tokens", row, 1, lambda asked: replace(asked, tokens=asked.step.row_tokens))
    if not checkpointing:
        yield Switch("training.gradient_checkpointing", "true", 2, lambda asked: replace(asked, checkpointing=True))
    yield from _smaller_weights(step)
    yield from _smaller_adapters(step)


def shorter_rows(tokens: int) -> Switch:
    """Sequences of so many tokens at most."""

    def on(asked: StepMemory) -> StepMemory:
        row = tokens * asked.step.task.sequences
        return asked.changed(row_tokens=row, row_labels=min(asked.step.row_labels, row))

    return Switch("data.max_length", str(tokens), 12, on)


def _optimizer(kind: str, price: int | None, note: str = "") -> Switch:
    optimizer = optimizers.make(kind)
    return Switch("training.optimizer", kind, price, lambda asked: asked.changed(optimizer=optimizer), note)


def _adapter_option(key: str, value: JsonValue, shown: str, price: int) -> Switch:
    def on(asked: StepMemory) -> StepMemory:
        return asked.changed(adapter=asked.step.adapter_with(**{key: value}))

    return Switch(f"adapter.{key}", shown, price, on)


def _smaller_weights(step: StepShape) -> Iterator[Switch]:
    section = step.quantization.section
    if getattr(section, "double_quant", True) is False:
        nested = quantizations.bind(section.model_copy(update={"double_quant": True}))
        yield Switch("model.quantization.double_quant", "true", 1, lambda asked: asked.changed(quantization=nested))
    if step.keeps_unpacked:
        key = "model.quantization.keep_unpacked"
        yield Switch(key, "false", 1, lambda asked: asked.changed(keeps_unpacked=False))
    if step.model.linears and section.kind not in ("nf4", "fp4"):
        nf4 = quantizations.make("nf4")
        yield Switch("model.quantization", "nf4", 5, lambda asked: asked.changed(quantization=nf4))


def _smaller_adapters(step: StepShape) -> Iterator[Switch]:
    section = step.adapter.section
    if getattr(section, "dropout", 0.0) > 0:
        yield _adapter_option("dropout", 0.0, "0.0", 3)
    rank = getattr(section, "r", 1)
    if rank > 1:
        yield _adapter_option("r", rank // 2, str(rank // 2), 6)
    linears = [x.name for x in step.model.linears if x.role in ("q", "v", "qkv") and not x.left_out]
    attention: list[JsonValue] = list(dict.fromkeys(linears))
    if attention and getattr(section, "target_modules", attention) != attention:
        yield _adapter_option("target_modules", attention, f"[{', '.join(dict.fromkeys(linears))}]", 8)
