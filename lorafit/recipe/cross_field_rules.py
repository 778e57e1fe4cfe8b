"""What two fields of a recipe must agree on. Each rule says which keys it is about; all of them are asked at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from lorafit.kinds.metrics import metrics
from lorafit.kinds.tasks import tasks
from lorafit.recipe.yaml_tree import KeyPath, parse_key

if TYPE_CHECKING:
    from lorafit.recipe.schema import Recipe, SourceSection

DATA_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".xlsx", ".txt", ".gz"})


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Two keys that do not go together.

    Attributes:
        keys: The keys it is about; the error stands at the first.
        what: What is wrong.
        todo: What to do about it.
        is_missing: Whether one of them is absent, rather than wrong.
        is_one_of_two: Whether one of them is enough, and either would do.
    """

    keys: tuple[str, ...]
    what: str
    todo: str
    is_missing: bool = False
    is_one_of_two: bool = False

    @property
    def paths(self) -> tuple[KeyPath, ...]:
        """The keys as key paths."""
        return tuple(parse_key(key) for key in self.keys)


def disagreements(recipe: Recipe) -> list[Disagreement]:
    """Everything in which fields of a recipe contradict each other."""
    return [found for rule in _RULES for found in rule(recipe)]


def _length_is_set_once(recipe: Recipe) -> Iterator[Disagreement]:
    training = recipe.training
    if training.epochs is not None and training.max_steps is not None:
        keys = ("training.max_steps", "training.epochs")
        yield Disagreement(keys, "training.epochs is set too", "keep one of the two", is_one_of_two=True)


def _warmup_fits_into_the_run(recipe: Recipe) -> Iterator[Disagreement]:
    steps, warmup = recipe.training.max_steps, recipe.training.schedule.warmup_steps
    if steps is not None and warmup is not None and warmup > steps:
        keys = ("training.schedule.warmup_steps", "training.max_steps")
        yield Disagreement(keys, f"{warmup} is more than training.max_steps {steps}", f"choose at most {steps}")


def _evaluation_has_rows(recipe: Recipe) -> Iterator[Disagreement]:
    if recipe.evaluation.every_steps is not None and recipe.data.validation is None:
        keys = ("evaluation.every_steps", "data.validation")
        todo = "add rows there, e.g. {fraction: 0.05}"
        yield Disagreement(keys, "needs data.validation, which is not set", todo, is_missing=True)


def _early_stopping_is_measured(recipe: Recipe) -> Iterator[Disagreement]:
    evaluation = recipe.evaluation
    if evaluation.early_stopping is None:
        return
    if evaluation.every_steps is None:
        keys = ("evaluation.early_stopping", "evaluation.every_steps")
        todo = "add it, e.g. every_steps: 50"
        yield Disagreement(keys, "needs evaluation.every_steps, which is not set", todo, is_missing=True)
    measured = list(dict.fromkeys(["loss", *evaluation.during]))
    if evaluation.early_stopping.metric not in measured:
        keys = ("evaluation.early_stopping.metric", "evaluation.during")
        what = f"'{evaluation.early_stopping.metric}' is not measured while training"
        yield Disagreement(keys, what, f"available metrics: {', '.join(measured)}; evaluation.during names more")


def _metrics_suit_the_task(recipe: Recipe) -> Iterator[Disagreement]:
    task = tasks.bind(recipe.task)
    for key, names in (("during", recipe.evaluation.during), ("final", recipe.evaluation.final)):
        for number, name in enumerate(names):
            if not task.can_score(name):
                apt = [other for other in metrics.names() if task.can_score(other)]
                keys = (f"evaluation.{key}[{number}]", "task")
                what = f"metric '{name}' reads what task {recipe.task.kind} does not give"
                yield Disagreement(keys, what, f"available: {', '.join(apt)}")


def _packing_suits_the_task(recipe: Recipe) -> Iterator[Disagreement]:
    if recipe.data.packing and not tasks.get(recipe.task.kind).packs:
        what = f"task {recipe.task.kind} takes one row a sequence"
        yield Disagreement(("data.packing", "task"), what, "set it to false")


def _hub_options_belong_to_the_hub(recipe: Recipe) -> Iterator[Disagreement]:
    base = recipe.model.base
    if recipe.model.revision is not None and (base.startswith("package://") or base.endswith(".gguf")):
        yield Disagreement(
            ("model.revision", "model.base"), "only hub ids have revisions, and model.base is a file", "remove it"
        )
    validation = recipe.data.validation
    lists: dict[str, Sequence[SourceSection]] = {
        "data.train": recipe.data.train,
        "data.validation": validation if isinstance(validation, list) else [],
        "data.test": recipe.data.test or [],
        "evaluation.retention": recipe.evaluation.retention or [],
    }
    for key, sources in lists.items():
        for number, source in enumerate(sources):
            yield from _source_options(f"{key}[{number}]", source)


def _source_options(key: str, source: SourceSection) -> Iterator[Disagreement]:
    if PurePath(source.path).suffix.lower() not in DATA_SUFFIXES:
        return
    for option in ("split", "subset", "revision"):
        if getattr(source, option) != type(source).model_fields[option].default:
            keys = (f"{key}.{option}", f"{key}.path")
            yield Disagreement(keys, f"only hub data sets have a {option}, and path is a file", "remove it")


_RULES: tuple[Callable[[Recipe], Iterator[Disagreement]], ...] = (
    _length_is_set_once,
    _warmup_fits_into_the_run,
    _evaluation_has_rows,
    _early_stopping_is_measured,
    _metrics_suit_the_task,
    _packing_suits_the_task,
    _hub_options_belong_to_the_hub,
)
