"""The cheapest set of switches with which a recipe fits on a card, as flags to paste.

Cheap is what costs little speed and no quality. Each switch has a price, dearest last, and a set costs their sum:

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
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from lorafit.kinds.optimizers import optimizers
from lorafit.kinds.quantizations import quantizations
from lorafit.plan.step_memory import find_largest

if TYPE_CHECKING:
    from lorafit.facts import ModelShape
    from lorafit.memory import MemoryEstimate
    from lorafit.recipe.schema import Recipe

MOST_SWITCHES = 3
_LEAST_ROW_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Switch:
    """One change of a recipe.

    Attributes:
        flag: As the command line has it, `KEY=VALUE`.
        price: See the module.
        section: Of the recipe; `changes` are to its fields.
    """

    flag: str
    price: int
    section: str
    changes: dict[str, Any]

    def on(self, recipe: Recipe) -> Recipe:
        """The recipe with it."""
        changed = getattr(recipe, self.section).model_copy(update=self.changes)
        return recipe.model_copy(update={self.section: changed})


@dataclass(frozen=True, slots=True)
class Enough:
    """A set of switches with which the recipe fits.

    Attributes:
        flags: `--set KEY=VALUE`, each.
        needed_bytes: What it needs with all of them.
    """

    flags: tuple[str, ...]
    needed_bytes: int

    @property
    def shown(self) -> str:
        """To be pasted."""
        return " ".join(self.flags)


def find_enough(
    recipe: Recipe,
    shape: ModelShape,
    longest_tokens: int,
    estimate: Callable[[Recipe], MemoryEstimate],
    holds: Callable[[MemoryEstimate], bool],
) -> Enough | None:
    """The cheapest set of at most three switches with which the recipe fits; None where there is none.

    Args:
        recipe: The recipe, which does not fit.
        shape: Its model.
        longest_tokens: Of its longest row.
        estimate: What a changed recipe needs.
        holds: Whether that fits on the card.
    """
    switches = list(_switches(recipe, shape, longest_tokens))
    sets = sorted(_sets(switches, MOST_SWITCHES), key=lambda chosen: (sum(one.price for one in chosen), len(chosen)))
    for chosen in sets:
        if holds(found := estimate(_with(recipe, chosen))):
            return _enough(chosen, found)
    best: tuple[int, tuple[Switch, ...]] | None = None
    for chosen in [(), *_sets(switches, MOST_SWITCHES - 1)]:
        changed = _with(recipe, chosen)

        def fits_at(tokens: int, changed: Recipe = changed) -> bool:
            return holds(estimate(_shorter(tokens).on(changed)))

        longest = find_largest(fits_at, _LEAST_ROW_TOKENS, longest_tokens)
        if longest is not None and (best is None or longest > best[0]):
            best = longest, (*chosen, _shorter(longest))
    return _enough(best[1], estimate(_with(recipe, best[1]))) if best is not None else None


def _enough(chosen: tuple[Switch, ...], found: MemoryEstimate) -> Enough:
    return Enough(tuple(f"--set {_quoted(one.flag)}" for one in chosen), found.needed_bytes)


def _quoted(flag: str) -> str:
    return f"'{flag}'" if "[" in flag else flag


def _sets(switches: list[Switch], most: int) -> Iterator[tuple[Switch, ...]]:
    """Every set of up to so many switches, of which no two say the same key."""
    for size in range(1, most + 1):
        for chosen in combinations(switches, size):
            if len({one.flag.partition("=")[0] for one in chosen}) == size:
                yield chosen


def _with(recipe: Recipe, chosen: tuple[Switch, ...]) -> Recipe:
    for one in chosen:
        recipe = one.on(recipe)
    return recipe


def _shorter(tokens: int) -> Switch:
    return Switch(f"data.max_length={tokens}", 12, "data", {"max_length": tokens})


def _switches(recipe: Recipe, shape: ModelShape, longest_tokens: int) -> Iterator[Switch]:
    training, adapter, section = recipe.training, recipe.adapter, recipe.model.quantization
    changes: dict[str, Any]
    if not training.optimizer.kind.endswith("8bit"):
        changes = {"optimizer": optimizers.make_section("adamw_8bit")}
        yield Switch("training.optimizer=adamw_8bit", 1, "training", changes)
    if isinstance(training.micro_batch_tokens, int) and training.micro_batch_tokens > longest_tokens:
        changes = {"micro_batch_tokens": longest_tokens}
        yield Switch(f"training.micro_batch_tokens={longest_tokens}", 1, "training", changes)
    if training.gradient_checkpointing is False:  # `auto` has turned it on where the card needs it
        yield Switch("training.gradient_checkpointing=true", 2, "training", {"gradient_checkpointing": True})
    for name, value, price in (("double_quant", True, 1), ("keep_unpacked", False, 1)):
        if getattr(section, name, value) not in (value, "auto"):
            changed = section.model_copy(update={name: value})
            flag = f"model.quantization.{name}={str(value).lower()}"
            yield Switch(flag, price, "model", {"quantization": changed})
    if shape.linears and section.kind not in ("nf4", "fp4"):
        yield Switch("model.quantization=nf4", 5, "model", {"quantization": quantizations.make_section("nf4")})
    if getattr(adapter, "dropout", 0.0) > 0:
        yield Switch("adapter.dropout=0.0", 3, "adapter", {"dropout": 0.0})
    rank = getattr(adapter, "r", 1)
    if rank > 1:
        yield Switch(f"adapter.r={rank // 2}", 6, "adapter", {"r": rank // 2})
    attention = list(dict.fromkeys(x.name for x in shape.linears if x.role in ("q", "v", "qkv") and not x.left_out))
    if attention and hasattr(adapter, "target_modules") and adapter.target_modules != attention:
        flag = f"adapter.target_modules=[{', '.join(attention)}]"
        yield Switch(flag, 8, "adapter", {"target_modules": attention})
