"""What two fields of a recipe must agree on. Each rule says which keys it is about; all of them are asked at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import get_args

from lorafit.console.wording import alternatives
from lorafit.kinds.adapters import adapters, refusal
from lorafit.kinds.metrics import metrics, with_companions
from lorafit.kinds.quantizations import quantizations
from lorafit.kinds.section import PACKED
from lorafit.kinds.tasks import tasks
from lorafit.ops.attention_kernels import VARLEN
from lorafit.recipe.foreign import suggest_word
from lorafit.recipe.schema import Recipe, sources_of
from lorafit.recipe.yaml_tree import KeyPath, parse_key

DATA_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".xlsx", ".txt", ".gz"})


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A rule between keys of a recipe that its values break.

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
    """Every rule between keys that a recipe breaks."""
    return [
        *_of_adapter(recipe),
        *_of_memory(recipe),
        *_of_training(recipe),
        *_of_evaluation(recipe),
        *_of_task(recipe),
        *_of_data(recipe),
        *_of_hub_options(recipe),
    ]


def _of_adapter(recipe: Recipe) -> Iterator[Disagreement]:
    why = refusal(recipe.adapter, quantizations.bind(recipe.model.quantization))
    if why is not None:
        keys = ("adapter.kind", "model.quantization")
        yield Disagreement(keys, why, "use another adapter, or another quantization")
    begins = adapters.bind(recipe.adapter).initialisation()
    if begins is not None and begins.reads == "retention" and recipe.evaluation.retention is None:
        keys = ("adapter.init", "evaluation.retention")
        what = "reads the rows of evaluation.retention, which is not set"
        yield Disagreement(keys, what, "name rows whose answers shall stay", is_missing=True)
    task = tasks.bind(recipe.task)
    if quantizations.bind(recipe.model.quantization).candidates() and (task.reference_columns or task.pools):
        keys = ("model.quantization", "task")
        what = f"calibration rows need a loss of their own, and that of {recipe.task.kind} takes other answers too"
        yield Disagreement(keys, what, "use another quantization, or name its linears, e.g. those of another run")


def _of_memory(recipe: Recipe) -> Iterator[Disagreement]:
    """How rows are packed, looked at, and recomputed."""
    adapter, attention = adapters.bind(recipe.adapter), recipe.model.attention
    yield from _unread(recipe, "adapter", adapter.unread)
    unpacked = recipe.data.packing is False or PACKED in {*adapter.unread, *tasks.bind(recipe.task).unread}
    if attention == VARLEN and unpacked:
        keys = ("model.attention", "data.packing")
        yield Disagreement(keys, "varlen attention is for packed rows, and no rows are packed", "write auto")
    if recipe.training.gradient_checkpointing in (True, "half") and adapter.no_checkpointing is not None:
        keys = ("training.gradient_checkpointing", "adapter.kind")
        what = f"{recipe.adapter.kind} takes no gradient checkpointing: {adapter.no_checkpointing}"
        yield Disagreement(keys, what, "write false or auto")


def _of_training(recipe: Recipe) -> Iterator[Disagreement]:
    steps, warmup = recipe.training.max_steps, recipe.training.schedule.warmup_steps
    if recipe.training.epochs is not None and steps is not None:
        keys = ("training.max_steps", "training.epochs")
        yield Disagreement(keys, "training.epochs is set too", "keep one of the two", is_one_of_two=True)
    if steps is not None and warmup is not None and warmup > steps:
        keys = ("training.schedule.warmup_steps", "training.max_steps")
        yield Disagreement(keys, f"{warmup} is more than training.max_steps {steps}", f"choose at most {steps}")
    if steps is not None and (why := adapters.bind(recipe.adapter).refuses_steps(steps)):
        keys = ("adapter.kind", "training.max_steps")
        yield Disagreement(keys, why, "raise training.max_steps, or lower the adapter's steps")
    unfreezing = recipe.training.unfreezing
    if unfreezing is not None and steps is not None and unfreezing.steps[-1] > steps:
        keys, what = ("training.unfreezing.steps", "training.max_steps"), f"end behind training.max_steps {steps}"
        yield Disagreement(keys, what, f"choose at most {steps}")
    if unfreezing is not None and (why := adapters.bind(recipe.adapter).refuses_unfreezing()):
        keys = ("training.unfreezing", "adapter.kind")
        yield Disagreement(keys, f"adapter {recipe.adapter.kind} {why}", "leave it out, or use another adapter")


def _of_evaluation(recipe: Recipe) -> Iterator[Disagreement]:
    evaluation, stopping = recipe.evaluation, recipe.evaluation.early_stopping
    if evaluation.every_steps is not None and recipe.data.validation is None:
        keys, todo = ("evaluation.every_steps", "data.validation"), "add rows there, e.g. {fraction: 0.05}"
        yield Disagreement(keys, "needs data.validation, which is not set", todo, is_missing=True)
    if stopping is not None and evaluation.every_steps is None:
        keys, todo = ("evaluation.early_stopping", "evaluation.every_steps"), "add it, e.g. every_steps: 50"
        yield Disagreement(keys, "needs evaluation.every_steps, which is not set", todo, is_missing=True)
    plateau = evaluation.on_plateau
    if plateau is not None and evaluation.every_steps is None:
        keys, todo = ("evaluation.on_plateau", "evaluation.every_steps"), "add it, e.g. every_steps: 50"
        yield Disagreement(keys, "needs evaluation.every_steps, which is not set", todo, is_missing=True)
    if plateau is not None and plateau.go_back:
        acts = adapters.bind(recipe.adapter).acts_between_steps
        others = (["adapter.kind"] if acts else []) + (["training.unfreezing"] if recipe.training.unfreezing else [])
        for other in others:
            what = f"weights would go back to an earlier step, and what {other} does between steps would not"
            yield Disagreement(("evaluation.on_plateau.go_back", other), what, "leave it out")
    if plateau is not None and stopping is not None and stopping.patience <= plateau.patience:
        keys = ("evaluation.on_plateau.patience", "evaluation.early_stopping.patience")
        what = f"early_stopping.patience {stopping.patience} ends the run before the learning rate falls"
        yield Disagreement(keys, what, f"choose at most {stopping.patience - 1}, or a larger patience there")
    for option in tasks.bind(recipe.task).chosen_options if evaluation.every_steps is None else ():
        keys, todo = (f"task.{option}", "evaluation.every_steps"), "add it, and data.validation, or set a number"
        what = "is chosen on validation rows, and evaluation.every_steps is not set"
        yield Disagreement(keys, what, todo, is_missing=True)
    measured = list(dict.fromkeys(["loss", *evaluation.during]))
    if stopping is not None and stopping.metric not in measured:
        keys = ("evaluation.early_stopping.metric", "evaluation.during")
        apt = [name for name in metrics.names() if tasks.bind(recipe.task).can_score(name)]
        near = suggest_word(stopping.metric, apt)
        measured = [name for name in measured if name in apt]
        todo = f"{near}available metrics: {', '.join(measured)}; evaluation.during names more"
        yield Disagreement(keys, f"'{stopping.metric}' is not measured while training", todo)
    if evaluation.length_penalty != 1.0 and evaluation.num_beams == 1:
        keys = ("evaluation.length_penalty", "evaluation.num_beams")
        yield Disagreement(keys, "only a beam search reads it", "set evaluation.num_beams, e.g. 4, or leave it out")
    for number, name in enumerate(evaluation.final):
        if metrics.get(name).embeds == "must" and evaluation.encoder is None:
            keys, todo = (f"evaluation.final[{number}]", "evaluation.encoder"), "name the folder of one, e.g. MiniLM's"
            what = f"{name} compares texts by a sentence encoder, and evaluation.encoder is not set"
            yield Disagreement(keys, what, todo, is_missing=True)
    if evaluation.encoder is not None and all(
        metrics.get(name).embeds == "no" for name in with_companions(evaluation.final)
    ):
        keys = ("evaluation.encoder", "evaluation.final")
        yield Disagreement(
            keys, "no metric of evaluation.final compares texts by it", "name one that does, or leave it out"
        )
    least, most = evaluation.min_new_tokens, evaluation.max_new_tokens
    if least > most:
        keys, todo = ("evaluation.min_new_tokens", "evaluation.max_new_tokens"), "lower it, or raise max_new_tokens"
        yield Disagreement(keys, f"{least} is more than max_new_tokens {most}", todo)


def _of_task(recipe: Recipe) -> Iterator[Disagreement]:
    task = tasks.bind(recipe.task)
    for key, names in (("during", recipe.evaluation.during), ("final", recipe.evaluation.final)):
        for number, name in enumerate(names):
            if not task.can_score(name):
                apt = [other for other in metrics.names() if task.can_score(other)]
                what = f"metric '{name}' reads what task {recipe.task.kind} does not give"
                yield Disagreement((f"evaluation.{key}[{number}]", "task"), what, f"available: {', '.join(apt)}")
    yield from _unread(recipe, "task", task.unread)


def _unread(recipe: Recipe, choice: str, unread: Mapping[str, str]) -> Iterator[Disagreement]:
    """Options that the kind of task or adapter does not read, or values of them that it can do nothing with."""
    for option, why in unread.items():
        key, _, refused = option.partition("=")
        name, field = key.split(".")
        section = getattr(recipe, name)
        value = getattr(section, field)
        if value != type(section).model_fields[field].default and refused in ("", str(value)):
            choices = get_args(type(section).model_fields[field].annotation) if refused else ()
            left = [each for each in choices if isinstance(each, str) and f"{key}={each}" not in unread]
            todo = f"leave it out{f', or set {alternatives(left)}' if left else ''}"
            kind = getattr(recipe, choice).kind
            yield Disagreement((key, choice), f"{choice} {kind} {why}", todo)


def _of_data(recipe: Recipe) -> Iterator[Disagreement]:
    if recipe.data.augment is not None and recipe.data.train_on == "all":
        keys = ("data.augment", "data.train_on")
        yield Disagreement(
            keys, "what it changes would be learnt with train_on: all", "train on answers, or leave it out"
        )


def _of_hub_options(recipe: Recipe) -> Iterator[Disagreement]:
    """Options that only mean something on the hub, set beside a file."""
    base = recipe.model.base
    if recipe.model.revision is not None and (base.startswith("package://") or base.endswith(".gguf")):
        what = "only hub ids have revisions, and model.base is a file"
        yield Disagreement(("model.revision", "model.base"), what, "remove it")
    lists = sources_of(recipe).items()
    numbered = ((f"{key}[{n}]", source) for key, sources in lists for n, source in enumerate(sources))
    for key, source in numbered:
        for option in ("split", "subset", "revision") if PurePath(source.path).suffix.lower() in DATA_SUFFIXES else ():
            if getattr(source, option) != type(source).model_fields[option].default:
                what = f"only hub data sets have a {option}, and path is a file"
                yield Disagreement((f"{key}.{option}", f"{key}.path"), what, "remove it")
