"""What each part of an adapter is worth: losses on held-out rows with parts of its update switched off.

    whole      layer 0'─> layer 1'─> layer 2'─> ...      all on; what each layer gives is kept, a micro-batch at a time
    base       layer 0 ─> layer 1 ─> layer 2 ─> ...      all off; likewise
    1 off      what 0' gave ───────> layer 1 ─> layer 2'      nothing before the part is computed again
    up to 1    what 0' gave ───────> layer 1'─> layer 2       0 and 1 on
    from 1     what 0 gave ────────> layer 1'─> layer 2'      1 and 2 on

Parts do each other's work: with one of them off the others hardly miss it, and the costs of each sum to far less than
the adapter gains. Its importance is the mean of what it saves as parts are switched on upwards and downwards:

    importance of i    ((up to i-1) - (up to i) + (from i+1) - (from i)) / 2

Both ways begin at the base and end at the whole, so importances sum to the gain. They are an estimate of the Shapley
values by one order and its reverse, which is exact where parts act on each other in pairs at most.

Source: Mitchell, Cooper, Frank and Holmes (2022), "Sampling Permutations for Shapley Value Estimation", JMLR 23
(antithetic orders); Shapley (1953), "A value for n-person games".
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lorafit.contracts import JsonObject
from lorafit.evaluation.runner import Scores, measure, score_in_ways
from lorafit.evaluation.statistics import Comparison, compare
from lorafit.kinds.metrics import RowScore, metrics
from lorafit.model.layer_numbers import OUTSIDE, layer_of, layer_paths
from lorafit.ops.holding import holding
from lorafit.ops.isolation import evaluating

if TYPE_CHECKING:
    from torch import nn

    from lorafit.answering.engine import Engine
    from lorafit.contracts import Batch, Reporter
    from lorafit.data.store import ExampleSet
    from lorafit.objective import Objective

Unit = Literal["layers", "modules"]
_RESAMPLES = 2_000
_INNER = re.compile(r"(\.base_layer|\.token_adapter)+$")


@dataclass(frozen=True)
class Importance:
    """One part of an adapter.

    Attributes:
        name: A layer's path or a module's.
        off: Loss of the adapter without it.
        worth: Its importance with its interval, as the difference of two means of losses.
    """

    name: str
    off: float
    worth: Comparison

    @property
    def value(self) -> float:
        """Loss that the part saves."""
        return self.worth.difference

    def to_json(self) -> JsonObject:
        """Plain values."""
        interval = [self.worth.low, self.worth.high]
        return {"name": self.name, "importance": self.value, "interval": interval, "off": self.off}


@dataclass(frozen=True)
class Ablation:
    """All parts.

    Attributes:
        unit: What a part is.
        split: Whose rows.
        rows: How many.
        all_rows: Of how many.
        base_loss: With all parts off.
        tuned_loss: With none.
        parts: In the order of the model.
    """

    unit: Unit
    split: str
    rows: int
    all_rows: int
    base_loss: float
    tuned_loss: float
    parts: tuple[Importance, ...]

    @property
    def gain(self) -> float:
        """What the whole adapter saves."""
        return self.base_loss - self.tuned_loss

    @property
    def off_together(self) -> float:
        """Sum of what switching off each part by itself costs."""
        return sum(part.off - self.tuned_loss for part in self.parts)

    def to_json(self) -> JsonObject:
        """Plain values."""
        return {
            "unit": self.unit,
            "split": self.split,
            "rows": self.rows,
            "all_rows": self.all_rows,
            "base_loss": self.base_loss,
            "tuned_loss": self.tuned_loss,
            "gain": self.gain,
            "off_together": self.off_together,
            "parts": [part.to_json() for part in self.parts],
        }


def ablate(
    engine: Engine,
    objective: Objective,
    examples: ExampleSet,
    unit: Unit,
    *,
    split: str,
    limit: int | None,
    micro_batch_tokens: int,
    pad_id: int,
    seed: int,
    reporter: Reporter,
) -> Ablation:
    """The importance of each layer or module of the one adapter of an engine.

    Args:
        engine: The base with it.
        objective: Around its model.
        examples: Rows.
        unit: What is switched off at a time.
        split: What the rows are called.
        limit: Only so many of them, the first; all where None.
        micro_batch_tokens: Padded tokens of a forward.
        pad_id: Fills up rows.
        seed: Of the intervals.
        reporter: Gets a bar.

    Raises:
        NumericsError: A row's loss is not finite.
    """
    rows = examples if limit is None or limit >= len(examples) else examples.first(limit)
    parts = _find_parts(objective.base, unit)
    ways, count = _Ways(engine, objective, parts), len(parts)
    with evaluating(objective):
        base, whole, *others = score_in_ways(
            objective,
            rows,
            3 * count,
            ways.score,
            micro_batch_tokens=micro_batch_tokens,
            pad_id=pad_id,
            reporter=reporter,
            what=f"losses with {unit} off",
        )
    off, up_to, begin_at = others[:count], others[count : 2 * count - 1], others[2 * count - 1 :]
    upwards, downwards = [base, *up_to, whole], [whole, *begin_at, base]
    mean, importances = partial(measure, ["loss"]), []
    for number, part in enumerate(parts):
        with_it = _halfway(upwards[number + 1], downwards[number])
        without = _halfway(upwards[number], downwards[number + 1])
        (worth,) = compare("loss", metrics.get("loss"), with_it, without, seed=seed, resamples=_RESAMPLES)
        importances.append(Importance(part.name, mean(off[number])["loss"], worth))
    return Ablation(unit, split, len(rows), len(examples), mean(base)["loss"], mean(whole)["loss"], tuple(importances))


def _halfway(one: Sequence[RowScore], other: Sequence[RowScore]) -> list[RowScore]:
    """Rows whose loss is the mean of two ways to compute it."""
    return [
        RowScore({**row.sums, "loss": ((row.value("loss") + same.value("loss")) / 2,)})
        for row, same in zip(one, other, strict=True)
    ]


@dataclass(frozen=True)
class _Part:
    """What is switched off at a time.

    Attributes:
        first_layer: Number of the layer that its first module lies in; 0 where one lies in none.
    """

    name: str
    modules: Sequence[nn.Module]
    first_layer: int


def _find_parts(base: Any, unit: Unit) -> list[_Part]:
    """By layer, those outside first. PEFT's layers say by `_disable_adapters` which of them compute."""
    layers = layer_paths(base)
    names = {number: path for path, number in layers.items()}
    groups: dict[str, list[tuple[int, nn.Module]]] = {}
    for path, module in base.named_modules():
        if hasattr(module, "_disable_adapters"):
            number = layer_of(path, layers)
            name = names.get(number, OUTSIDE) if unit == "layers" else _INNER.sub("", path)
            groups.setdefault(name, []).append((number, module))
    first = {name: min(number for number, _ in members) for name, members in groups.items()}
    return [
        _Part(name, [module for _, module in groups[name]], max(0, first[name]))
        for name in sorted(groups, key=lambda name: first[name])
    ]


class _Ways:
    """The scores of a micro-batch: of the base, of the whole adapter, and with parts off.

    Args:
        engine: See `ablate`.
        objective: Likewise.
        parts: What is switched off.
    """

    def __init__(self, engine: Engine, objective: Objective, parts: Sequence[_Part]) -> None:
        self._engine, self._objective, self._parts = engine, objective, parts
        self._layers = [objective.base.get_submodule(path) for path in layer_paths(objective.base)]
        self._may_replay: bool | None = None

    def score(self, batch: Batch) -> Iterator[Scores]:
        """One for each way, in that order."""
        with self._engine.using(None), _kept(self._layers) as given_by_base:
            yield self._objective.score(batch)
        with _kept(self._layers) as given:
            whole = self._objective.score(batch)
        yield whole
        if self._may_replay is None:  # a model may hand on more than its layers' results, or change them in place
            with self._replayed(given, len(self._layers) - 1):
                again = self._objective.score(batch)
            self._may_replay = all((again[name] == whole[name]).all() for name in whole)
        parts = self._parts
        for part in parts:
            yield self._score_without([part], given, part, batch)
        for number, part in enumerate(parts[:-1]):
            yield self._score_without(parts[number + 1 :], given, part, batch)
        for number, part in enumerate(parts[1:]):
            yield self._score_without(parts[: number + 1], given_by_base, part, batch)

    def _score_without(self, parts: Sequence[_Part], given: Mapping[int, Any], first: _Part, batch: Batch) -> Scores:
        """With parts off, and layers before that part as they were."""
        before = first.first_layer if self._may_replay else 0
        with _off([module for part in parts for module in part.modules]), self._replayed(given, before):
            return self._objective.score(batch)

    @contextlib.contextmanager
    def _replayed(self, given: Mapping[int, Any], before: int) -> Iterator[None]:
        """Within it layers before that number give what they gave."""
        with contextlib.ExitStack() as held:
            for number, layer in enumerate(self._layers[:before]):
                held.enter_context(holding(vars(layer), "forward", partial(_give, given[number])))
            yield


def _give(result: Any, *arguments: Any, **named: Any) -> Any:
    return result


@contextlib.contextmanager
def _kept(layers: Sequence[nn.Module]) -> Iterator[dict[int, Any]]:
    """What each layer gives, by its number."""
    given: dict[int, Any] = {}
    with contextlib.ExitStack() as hooks:
        for number, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_hook(partial(_keep, given, number)))
        yield given


def _keep(given: dict[int, Any], number: int, layer: nn.Module, arguments: Any, result: Any) -> None:
    given[number] = result


@contextlib.contextmanager
def _off(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it the base's own layers compute in the place of these."""
    with contextlib.ExitStack() as held:
        for module in modules:
            held.enter_context(holding(vars(module), "_disable_adapters", True))
        yield
