"""What would make a recipe need less on a card: each switch alone, and the cheapest set with which it fits.

A switch is what could be otherwise in a recipe. It has a price, dearest last; cheap is what costs little speed and no
quality:

    1   optimizer in 8 bits; quantised constants; no unpacked copies; one row a micro-batch; gradient checkpointing of
        every second layer (about a sixth slower)
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
from functools import reduce
from itertools import combinations

from lorafit.contracts import JsonValue
from lorafit.facts import DeviceFacts
from lorafit.kinds.adapters import refusal
from lorafit.kinds.optimizers import optimizers
from lorafit.kinds.quantizations import quantizations
from lorafit.memory import StepMemory, StepShape, covers, find_largest, fits
from lorafit.memory.peak import ALLOCATOR_FACTOR
from lorafit.ops.recomputed_layers import Checkpointing
from lorafit.plan.recipe_step import with_room

LEAST_ROW_TOKENS = 8
MOST_SWITCHES = 3


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


def switches(now: StepMemory, checkpointing: Checkpointing) -> Iterator[Switch]:
    """Everything that could be otherwise, shorter rows apart.

    Args:
        now: The recipe's step.
        checkpointing: Which layers are checkpointed as things are.
    """
    step = now.step
    if not step.optimizer.section.kind.endswith("8bit"):
        yield _optimizer("adamw_8bit", 1)
    if step.device_kind == "cuda" and not step.optimizer.is_paged:
        yield _optimizer("paged_adamw_8bit", None, "once its state has left the card")
    if now.least_tokens > step.row_tokens:
        row = str(step.row_tokens)
        yield Switch("training.micro_batch_tokens", row, 1, lambda asked: replace(asked, tokens=asked.step.row_tokens))
    key = "training.gradient_checkpointing"
    if checkpointing is False:
        yield Switch(key, "half", 1, lambda asked: replace(asked, checkpointing="half"))
    if checkpointing is not True:
        yield Switch(key, "true", 2, lambda asked: replace(asked, checkpointing=True))
    yield from _smaller_weights(step)
    yield from _smaller_adapters(step)


def shorter_rows(tokens: int) -> Switch:
    """Sequences of so many tokens at most."""

    def on(asked: StepMemory) -> StepMemory:
        row, labels = asked.step.task.assumed_row(tokens)
        return asked.changed(row_tokens=row, row_labels=min(asked.step.row_labels, labels))

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
        packed = quantizations.bind(section.model_copy(update={"keep_unpacked": False}))
        key = "model.quantization.keep_unpacked"
        yield Switch(key, "false", 1, lambda asked: asked.changed(keeps_unpacked=False, quantization=packed))
    nf4 = quantizations.make("nf4")
    takes_nf4 = refusal(step.adapter.section, nf4) is None
    if step.model.linears and section.kind not in ("nf4", "fp4") and takes_nf4:
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


@dataclass(frozen=True, slots=True)
class Saving:
    """What one switch would save.

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
class Enough:
    """A set of switches with which the recipe fits.

    Attributes:
        flags: `--set KEY=VALUE`, each.
        needed_bytes: What the recipe with all of them needs, what `auto` gives where there is room again included.
    """

    flags: tuple[str, ...]
    needed_bytes: int

    @property
    def shown(self) -> str:
        """To be pasted."""
        return " ".join(self.flags)


def find_savings(
    now: StepMemory, checkpointing: Checkpointing, device: DeviceFacts | None, headroom: float
) -> tuple[Saving, ...]:
    """The switches that save something, the largest saving first."""
    needed, found = now.at(now.least_tokens, checkpointing).needed_bytes, []
    half = now.step.sequence_tokens // 2
    shorter = [shorter_rows(half)] if half >= LEAST_ROW_TOKENS else []
    for switch in (*switches(now, checkpointing), *shorter):
        changed = switch.on(replace(now, checkpointing=checkpointing))
        memory, _ = changed.settle(None, headroom)
        left = round(memory.paged_bytes * ALLOCATOR_FACTOR[memory.device_kind]) if switch.note else 0
        saved = needed - memory.needed_bytes + left
        if saved > 0:
            enough = None if device is None else fits(memory, device.memory_bytes, headroom)
            found.append(Saving(switch.line, saved, enough, switch.note))
    return tuple(sorted(found, key=lambda saving: -saving.saved_bytes))


def find_enough(now: StepMemory, checkpointing: Checkpointing, device: DeviceFacts, headroom: float) -> Enough | None:
    """The cheapest set of at most three switches with which a recipe fits that does not; None where there is none.

    Where no set is enough, the switches that save most are tried, one by one, with the longest rows that fit then.
    Where each estimate is a dry run, sets of which the switches alone would not save enough together are not tried.

    Args:
        now: The recipe's step.
        checkpointing: Which layers are checkpointed as things are.
        device: The card.
        headroom: Share of its memory that stays free.
    """
    limit = device.memory_bytes * (1.0 - headroom)

    def needs(chosen: tuple[Switch, ...]) -> int:
        return _with(now, chosen).settle(device, headroom)[0].needed_bytes

    def enough(chosen: tuple[Switch, ...]) -> Enough:
        memory, _ = with_room(_with(now, chosen), device, headroom).settle(device, headroom)
        return Enough(tuple(one.flag for one in chosen), memory.needed_bytes)

    possible = [switch for switch in switches(now, checkpointing) if switch.price is not None]
    needed = needs(())
    saved = {switch.flag: needed - needs((switch,)) for switch in possible}
    sets = sorted(_sets(possible), key=lambda chosen: (sum(one.price or 0 for one in chosen), len(chosen)))
    for chosen in sets:
        if not covers(now.step) and sum(saved[one.flag] for one in chosen) < needed - limit:
            continue
        if needs(chosen) <= limit:
            return enough(chosen)
    best: tuple[int, tuple[Switch, ...]] | None = None
    others: tuple[Switch, ...] = ()
    while True:

        def needs_at(tokens: int, others: tuple[Switch, ...] = others) -> int:
            return needs((*others, shorter_rows(tokens)))

        longest = find_largest(needs_at, limit, LEAST_ROW_TOKENS, now.step.sequence_tokens)
        if longest is not None and (best is None or longest > best[0]):
            best = longest, (*others, shorter_rows(longest))
        left = [one for one in possible if one.key not in {other.key for other in others}]
        if len(others) == MOST_SWITCHES - 1 or not left:
            return best and enough(best[1])
        others = min(((*others, one) for one in left), key=needs)


def _sets(possible: list[Switch]) -> Iterator[tuple[Switch, ...]]:
    """Every set of up to `MOST_SWITCHES`, of which no two say the same key."""
    for size in range(1, MOST_SWITCHES + 1):
        for chosen in combinations(possible, size):
            if len({one.key for one in chosen}) == size:
                yield chosen


def _with(now: StepMemory, chosen: tuple[Switch, ...]) -> StepMemory:
    return reduce(lambda asked, switch: switch.on(asked), chosen, now)
