"""What `lorafit compose` gives back: the adapter, what each layer lost, and the loss on rows that nobody trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.console.reporting import Printed, say, show_table
from lorafit.console.wording import counted, near
from lorafit.contracts import JsonObject

if TYPE_CHECKING:
    from rich.console import Console

    from lorafit.evaluation.statistics import Comparison
    from lorafit.model.products import LayerError

SHOWN_LAYERS = 8
_NEGLIGIBLE = 1e-9


@dataclass(frozen=True)
class Scored:
    """Losses on one set of rows.

    Attributes:
        rows: What they are called.
        losses: By what was scored beside the result: its loss as `base`, the result's as `tuned`.
    """

    rows: str
    losses: Mapping[str, Comparison]

    def to_json(self) -> JsonObject:
        """Plain values."""
        return {"rows": self.rows, "losses": {who: one.to_json() for who, one in self.losses.items()}}


@dataclass(frozen=True)
class Fitted:
    """Weights that were found on rows.

    Attributes:
        file: The rows.
        rows: Their number.
        started: Weights before, by name.
        weights: Weights found.
        before: Loss of the rows with the first.
        after: With the second.
        tries: How often all rows were read.
    """

    file: str
    rows: int
    started: Mapping[str, float]
    weights: Mapping[str, float]
    before: float
    after: float
    tries: int

    def to_json(self) -> JsonObject:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Composed(Printed):
    """An adapter that was made of several.

    Attributes:
        output: Its folder.
        weights: Of each adapter, in order.
        method: `sum`, `ties` or `dare`.
        rank: Of the result.
        errors: What each layer lost of its update.
        fitted: How the weights were found, where they were.
        scores: Losses by set of rows.
    """

    output: Path
    weights: Mapping[str, float]
    method: str
    rank: int
    errors: Sequence[LayerError]
    fitted: Fitted | None
    scores: Sequence[Scored]

    @property
    def share(self) -> float:
        """What the result lost of the whole update."""
        from lorafit.model.products import share_of_all

        return share_of_all(self.errors)

    @property
    def formula(self) -> str:
        """The weighted sum, as `compose` reads it."""
        return write_sum(self.weights)

    def to_json(self) -> JsonObject:
        """Plain values."""
        return {
            "output": str(self.output),
            "sum": self.formula,
            "weights": dict(self.weights),
            "method": self.method,
            "rank": self.rank,
            "share": self.share,
            "layers": [{**asdict(error), "share": error.share} for error in self.errors],
            "fitted": None if self.fitted is None else self.fitted.to_json(),
            "scores": [one.to_json() for one in self.scores],
        }

    def render(self, console: Console) -> None:
        """The layers that lost most, the losses, and the folder."""
        if self.share > _NEGLIGIBLE:
            worst = sorted(self.errors, key=lambda error: -error.share)[:SHOWN_LAYERS]
            rows: list[tuple[str, ...]] = [(e.layer, f"{e.error:.4g}", f"{100 * e.share:.2f} %") for e in worst]
            show_table(console, ("layers that lose most", "Frobenius norm", "of their update"), rows)
            console.print()
        for one in self.scores:
            rows = [(who, each.show(each.base), each.span, each.verdict) for who, each in one.losses.items()]
            any_of = next(iter(one.losses.values()))
            rows.append(("the result", any_of.show(any_of.tuned), "", ""))
            headings = (f"{one.rows} ({counted(any_of.rows, 'row')})", "loss", "95 % interval of result - it", "result")
            show_table(console, headings, rows, words=(0, 3))
            console.print()
        if (fit := self.fitted) is not None:
            found = f"weights found on {counted(fit.rows, 'row')} of {fit.file}: {write_sum(fit.weights)}"
            say(console, f"{found}; loss there {fit.before:.4f} -> {fit.after:.4f}, from {write_sum(fit.started)}")
        lost = f", {100 * self.share:.2f} % of the update lost" if self.share > _NEGLIGIBLE else ", exact"
        how = "" if self.method == "sum" else f"{self.method} of "
        say(console, f"{how}{self.formula}: rank {self.rank}{lost}: {near(self.output)}")


def write_sum(weights: Mapping[str, float]) -> str:
    """`0.7*a + 0.3*b - c`."""
    text = ""
    for name, weight in weights.items():
        sign = ("-" if weight < 0 else "") if not text else (" - " if weight < 0 else " + ")
        text += sign + (name if abs(weight) == 1 else f"{abs(weight):.4g}*{name}")
    return text
