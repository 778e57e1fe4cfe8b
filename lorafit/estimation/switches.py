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

from lorafit.kinds.adapters import adapters
from lorafit.kinds.optimizers import optimizers
from lorafit.kinds.quantizations import quantizations
from lorafit.memory import StepShape
from lorafit.plan.recipe_step import RecipeStep

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
    on: Callable[[RecipeStep], RecipeStep]
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


def switches(now: RecipeStep, checkpointing: bool) -> Iterator[Switch]:
    """Everything that could be otherwise, shorter rows apart.

    Args:
        now: The recipe's step.
        checkpointing: Whether layers are checkpointed as things are.
    """
    step = now.memory.step
    if not step.optimizer.section.kind.endswith("8bit"):
        yield Switch("training.optimizer", "adamw_8bit", 1, _with_optimizer("adamw_8bit"))
    if step.device_kind == "cuda" and not step.optimizer.is_paged:
        on, note = _with_optimizer("paged_adamw_8bit"), "once its state has left the card"
        yield Switch("training.optimizer", "paged_adamw_8bit", None, on, note)
    if now.least_tokens > step.row_tokens:
        yield Switch(
            "training.micro_batch_tokens",
            str(step.row_tokens),
            1,
            lambda asked: replace(asked, tokens=asked.memory.step.row_tokens),
        )
    if not checkpointing:
        yield Switch("training.gradient_checkpointing", "true", 2, lambda asked: replace(asked, checkpointing=True))
    yield from _smaller_weights(step)
    yield from _smaller_adapters(step)


def shorter_rows(tokens: int) -> Switch:
    """Sequences of so many tokens at most."""
    return Switch("data.max_length", str(tokens), 12, _changed(lambda step: step.with_rows(tokens)))


def _smaller_weights(step: StepShape) -> Iterator[Switch]:
    section = step.quantization.section
    if getattr(section, "double_quant", True) is False:
        nested = quantizations.bind(section.model_copy(update={"double_quant": True}))
        on = _changed(lambda step: replace(step, quantization=nested))
        yield Switch("model.quantization.double_quant", "true", 1, on)
    if step.keeps_unpacked:
        on = _changed(lambda step: replace(step, keeps_unpacked=False))
        yield Switch("model.quantization.keep_unpacked", "false", 1, on)
    if step.model.linears and section.kind not in ("nf4", "fp4"):
        on = _changed(lambda step: replace(step, quantization=quantizations.make("nf4")))
        yield Switch("model.quantization", "nf4", 5, on)


def _smaller_adapters(step: StepShape) -> Iterator[Switch]:
    section = step.adapter.section
    if getattr(section, "dropout", 0.0) > 0:
        yield Switch("adapter.dropout", "0.0", 3, _with_adapter("dropout", 0.0))
    rank = getattr(section, "r", 1)
    if rank > 1:
        yield Switch("adapter.r", str(rank // 2), 6, _with_adapter("r", rank // 2))
    linears = [x.name for x in step.model.linears if x.role in ("q", "v", "qkv") and not x.left_out]
    attention = list(dict.fromkeys(linears))
    if attention and getattr(section, "target_modules", attention) != attention:
        names = f"[{', '.join(attention)}]"
        yield Switch("adapter.target_modules", names, 8, _with_adapter("target_modules", attention))


def _changed(change: Callable[[StepShape], StepShape]) -> Callable[[RecipeStep], RecipeStep]:
    return lambda asked: asked.of(change(asked.memory.step))


def _with_optimizer(kind: str) -> Callable[[RecipeStep], RecipeStep]:
    return _changed(lambda step: replace(step, optimizer=optimizers.make(kind)))


def _with_adapter(key: str, value: float | list[str]) -> Callable[[RecipeStep], RecipeStep]:
    def change(step: StepShape) -> StepShape:
        return replace(step, adapter=adapters.bind(step.adapter.section.model_copy(update={key: value})))

    return _changed(change)
