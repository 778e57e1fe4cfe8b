"""One recipe on several cards, a row each: what people ask before they buy or rent one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafit.console.reporting import Printed
from lorafit.console.wording import quantised_as
from lorafit.errors import DoesNotFitError
from lorafit.estimation.table import RecipeEstimate, figures, format_seconds
from lorafit.machine.devices import format_bytes
from lorafit.ops.recomputed_layers import CHECKPOINTING

if TYPE_CHECKING:
    from rich.console import Console

    from lorafit.contracts import JsonObject


@dataclass(frozen=True)
class CardComparison(Printed):
    """The answer of `estimate-memory` with several `--gpu`.

    Attributes:
        estimates: One a card, in the order they were named.
    """

    estimates: tuple[RecipeEstimate, ...]

    def render(self, console: Console) -> None:
        """A table for people, a row a card."""
        first = self.estimates[0]
        console.print(
            f"{first.recipe.model.base}, {quantised_as(first.quantization)}",
            style="bold",
            markup=False,
            highlight=False,
        )
        if first.rows.facts is None:
            missing = first.rows.missing or "none were given"
            console.print(f"rows not read: {missing}; data.max_length stands for them", markup=False, highlight=False)
        what = "the run" if first.cost.is_whole_run else "1M tokens"
        table = figures("card", "usable", "needed", "checkpointing", "fits", what)
        for one in self.estimates:
            assert one.device is not None
            seconds = one.cost.seconds()
            table.add_row(
                one.device.name,
                format_bytes(one.device.memory_bytes),
                format_bytes(one.needed_bytes),
                CHECKPOINTING[one.memory.gradient_checkpointing],
                {True: "yes", False: "no", None: "not known"}[one.fits],
                format_seconds(seconds) if seconds is not None else "-",
                style="" if one.fits else "red",
            )
        console.print(table)
        console.print(f"{first.options.headroom:.0%} of each card stay free; one --gpu alone says more of it")

    def to_json(self) -> JsonObject:
        """Plain values, sizes in bytes."""
        return {
            "name": self.estimates[0].recipe.name,
            "model": self.estimates[0].recipe.model.base,
            "cards": [
                {key: each[key] for key in ("gpu", "fits", "headroom", "memory", "exact", "cost")}
                for each in (one.to_json() for one in self.estimates)
            ],
        }

    def raise_unless_fits(self) -> None:
        """For the exit code.

        Raises:
            DoesNotFitError: It fits on none of the cards.
        """
        if all(one.fits is False for one in self.estimates):
            least = min(one.needed_bytes for one in self.estimates)
            raise DoesNotFitError(
                f"fits on none of the {len(self.estimates)} cards: needs {format_bytes(least)}",
                key="--gpu",
                todo=f"{self.estimates[0].larger}, or name one card alone to see what would save memory",
            )
