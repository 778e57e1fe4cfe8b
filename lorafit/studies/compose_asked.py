"""What `lorafit compose` was asked for, read and checked before torch is loaded: adapters, weights, ranks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.console.arguments import read_adapters
from lorafit.console.nearest import did_you_mean
from lorafit.console.wording import list_names
from lorafit.contracts import Reporter
from lorafit.errors import UsageError
from lorafit.files.atomic import read_object
from lorafit.run.workspace import OpenedRun, is_lone_adapter, is_model, open_run
from lorafit.studies.weighted_sum import NAME, read_sum

if TYPE_CHECKING:
    from lorafit.answering.tuned import Tuned
    from lorafit.model.base import Base

METHODS = ("sum", "ties", "dare")
BY_ROWS = "rows"


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter as it was named: a run's, or a folder by itself."""

    name: str
    path: Path
    opened: OpenedRun | None

    @cached_property
    def folder(self) -> Path:
        """The adapter's own."""
        return self.path if self.opened is None else self.opened.adapter(None)[0]

    def training_rows(self) -> int:
        """Of the run. Raises UsageError where it is an adapter alone."""
        if self.opened is None or not self.opened.run.data.is_file():
            what = f"'{self.name}' is no run, and nothing tells its training rows"
            raise UsageError(what, key="--weights", todo="name runs, or give numbers: --weights 100,300")
        return int(read_object(self.opened.run.data)["splits"]["train"]["rows"])

    def tuned(self, base_model: str | None, reporter: Reporter) -> Tuned:
        """With its card and base. Raises ModelError where the base is not here."""
        from lorafit.answering.tuned import Tuned, open_lone_adapter, open_tuned

        if self.opened is not None:
            return open_tuned(self.opened, None, base_model, reporter)
        saved, base = open_lone_adapter(self.path, base_model, reporter)
        card = saved.card()
        assert card is not None, "rows are scored by an adapter with a card"
        return Tuned(card, base, self.path)

    def base(self, base_model: str | None, reporter: Reporter) -> Base:
        """Of an adapter that may have no card."""
        from lorafit.answering.tuned import open_lone_adapter

        if self.opened is not None:
            return self.tuned(base_model, reporter).base
        return open_lone_adapter(self.path, base_model, reporter)[1]


def read_named(texts: Sequence[str]) -> dict[str, Path]:
    """Paths by name, from `NAME=DIR` texts. Raises UsageError also for a name that cannot stand in a sum."""
    found = read_adapters(texts)
    for name in found:
        if not NAME.fullmatch(name):
            what = f"'{name[:40]}' is no name for a sum"
            raise UsageError(what, key="--adapter", todo="take letters, digits, _ and ., a letter first")
    if not found:
        raise UsageError("no adapter is named", key="--adapter", todo="add --adapter a=DIR for each name of the sum")
    return found


def read_rank(rank: int | str | None) -> int | float | None:
    """A whole number from 1; or a share of `5%`. Raises UsageError where it is neither."""
    if rank is None:
        return None
    text = str(rank).strip()
    share = text.removesuffix("%").strip()
    with contextlib.suppress(ValueError):
        if text.endswith("%") and 0 < float(share) < 100:
            return float(share) / 100
        if text.isascii() and text.isdigit() and int(text) > 0:
            return int(text)
    what = f"'{text[:40]}' is no rank"
    raise UsageError(what, key="--rank", todo="give a whole number from 1, or what may be lost, e.g. 1%")


def open_named(name: str, path: Path) -> NamedAdapter:
    """Says before torch is loaded where a path is no run and no adapter."""
    if is_lone_adapter(path):
        return NamedAdapter(name, path, None)
    if is_model(path):
        todo = "name a run or an adapter folder"
        raise UsageError("is a whole model and no adapter", file=str(path), key="--adapter", todo=todo)
    if path.is_file() and path.suffix not in (".yaml", ".yml"):
        todo = "name the folder that it lies in"
        raise UsageError("is a file and no folder of an adapter", file=str(path), key="--adapter", todo=todo)
    found = NamedAdapter(name, path, open_run(path))
    found.folder  # noqa: B018  # says where the run has no finished adapter
    return found


def check_flags(
    expression: str | None,
    *,
    mean: bool,
    weights: str | None,
    method: str,
    density: float | None,
    fit_rows: Path | None,
) -> None:
    """Raises UsageError where flags do not go together."""
    if method not in METHODS:
        todo = f"{did_you_mean(method, METHODS)}use {', '.join(METHODS)}"
        raise UsageError(f"'{method}' is no method", key="--method", todo=todo)
    if expression is not None and mean:
        raise UsageError("a sum is written already", key="--mean", todo="leave out one of them")
    if weights is not None and not mean:
        raise UsageError("only a mean reads it", key="--weights", todo="add --mean, or write a sum")
    if expression is None and not mean and fit_rows is None:
        todo = 'write one, e.g. "0.7*a + 0.3*b", or add --mean or --fit ROWS'
        raise UsageError("needs a sum of adapters", key="SUM", todo=todo)
    if density is not None and method == "sum":
        raise UsageError("only ties and dare read it", key="--density", todo="add --method ties, or leave it out")
    if fit_rows is not None and method != "sum":
        todo = "leave out --fit or --method"
        raise UsageError(f"weights are fitted for a sum, and {method} is none", key="--fit", todo=todo)


def choose_weights(
    expression: str | None, named: Sequence[NamedAdapter], *, mean: bool, weights: str | None
) -> dict[str, float]:
    """Weights as they are asked for; equal ones where nobody says."""
    names = [each.name for each in named]
    if expression is not None:
        return read_sum(expression, names)
    if weights is None:
        given = [1.0] * len(names)
    elif weights.strip() == BY_ROWS:
        given = [float(each.training_rows()) for each in named]
    else:
        given = _read_numbers(weights, len(names))
    return {name: number / sum(given) for name, number in zip(names, given, strict=True)}


def _read_numbers(text: str, count: int) -> list[float]:
    found: list[float] = []
    for word in text.split(","):
        try:
            found.append(float(word))
        except ValueError:
            what, todo = f"'{word.strip()[:40]}' is no number", "give numbers with commas, e.g. 0.2,0.8, or rows"
            raise UsageError(what, key="--weights", todo=todo) from None
    if len(found) != count:
        todo = "give one for each --adapter, in order"
        raise UsageError(f"{len(found)} weights for {count} adapters", key="--weights", todo=todo)
    if not all(math.isfinite(number) and number >= 0 for number in found) or not sum(found):
        what = "a mean has weights from 0, and not all 0"
        raise UsageError(what, key="--weights", todo="write a sum for negative ones")
    return found


def leave_out(
    named: list[NamedAdapter], chosen: Mapping[str, float], reporter: Reporter, *, is_fitted: bool
) -> list[NamedAdapter]:
    """The adapters that count, in the order of the sum; those of weight 0 do not."""
    by_name = {each.name: each for each in named}
    unread = [name for name in by_name if name not in chosen]
    zero = [name for name, weight in chosen.items() if not weight and not is_fitted]
    kept = [by_name[name] for name in chosen if name not in zero]
    if not kept:
        raise UsageError("every weight is 0, and nothing is left", key="SUM", todo="give one that is not")
    if unread:
        reporter.warn(f"not in the sum, and left out: {list_names(unread)}")
    if zero:
        reporter.warn(f"of weight 0, and left out: {list_names(zero)}")
    return kept
