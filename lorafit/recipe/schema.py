"""The recipe as frozen pydantic models. A field's docstring is its line in the reference, with its unit.

Only what is built stands here. Kinds bring their own sections (`lorafit.kinds`). What two fields must agree on stands
in `lorafit.recipe.cross_field_rules`, so that every disagreement of a recipe is reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    WithJsonSchema,
    WrapSerializer,
    field_validator,
    model_validator,
)

from lorafit.kinds.adapters import AdapterSection, adapters
from lorafit.kinds.curricula import CurriculumSection, curricula
from lorafit.kinds.formats import formats
from lorafit.kinds.metrics import metrics
from lorafit.kinds.optimizers import OptimizerSection, optimizers
from lorafit.kinds.quantizations import QuantizationSection, quantizations
from lorafit.kinds.registry import as_bare_word
from lorafit.kinds.schedules import ScheduleSection, schedules
from lorafit.kinds.section import PATH, PATH_OR_NAME, Section
from lorafit.kinds.tasks import TaskSection, tasks
from lorafit.ops.recomputed_layers import Checkpointing
from lorafit.recipe.augment_section import AugmentSection
from lorafit.recipe.foreign import is_not_yet, suggest_word
from lorafit.recipe.yaml_tree import Plain

if TYPE_CHECKING:
    AdapterChoice = AdapterSection
    CurriculumChoice = CurriculumSection
    OptimizerChoice = OptimizerSection
    QuantizationChoice = QuantizationSection
    ScheduleChoice = ScheduleSection
    TaskChoice = TaskSection
else:
    AdapterChoice = adapters.one_of("lora")
    CurriculumChoice = curricula.one_of()
    OptimizerChoice = optimizers.one_of("adamw")
    QuantizationChoice = quantizations.one_of("nf4")
    ScheduleChoice = schedules.one_of("cosine")
    TaskChoice = Annotated[tasks.one_of("causal-lm"), WrapSerializer(as_bare_word)]

LARGEST_COUNT = 2**31 - 1
"""Whole numbers up to this fit the counters of every library below."""
Auto = Literal["auto"]


def _one_line(value: str) -> str:
    if any(letter in value for letter in "\n\r\t\v\f\x85\u2028\u2029"):
        raise ValueError("holds a tab or a line break; write it on one line")
    return value


Line = Annotated[str, AfterValidator(_one_line)]
Word = Annotated[str, StringConstraints(min_length=1), AfterValidator(_one_line)]
Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]


def one_name_of(
    what: str, names: Sequence[str], part_of: Mapping[str, str] | None = None
) -> tuple[AfterValidator, WithJsonSchema]:
    """What makes a text one of some names; its error lists the nearest and all of them, or what it is a part of."""

    def check(value: str) -> str:
        if value in names:
            return value
        if part_of and value in part_of:
            raise ValueError(f"'{value}' is no {what} by itself; name {part_of[value]}, which it comes with")
        if is_not_yet(what, value):
            raise ValueError(f"{what} '{value}' does not exist yet; available: {', '.join(names)}")
        raise ValueError(f"unknown {what} '{value}'; {suggest_word(value, names)}available: {', '.join(names)}")

    return AfterValidator(check), WithJsonSchema({"enum": names})


_USUAL = tasks.make("causal-lm")
_WHILE_TRAINING = [name for name, metric in metrics.items() if metric.while_training]

FormatName = Annotated[str, *one_name_of("format", ["auto", *formats.names()])]
_PARTS = {part: name for name, metric in metrics.items() for part in metric.beside}
MetricName = Annotated[str, *one_name_of("metric", metrics.names(), _PARTS)]
RepeatedMetricName = Annotated[str, *one_name_of("metric while training", _WHILE_TRAINING)]


class ModelSection(Section):
    """The frozen base model."""

    base: Word = Field(json_schema_extra=PATH_OR_NAME)
    """Hub id, local directory, `.gguf` file, or `package://NAME/FILE.gguf` (a file in an installed Python package)."""
    revision: Word | None = None
    """Branch, tag or commit on the hub; only for hub ids."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of weights that are not quantised, and of compute. `auto`: bf16 where the device computes it at speed, else fp16
    on a GPU, fp32 on a CPU."""
    attention: Literal["auto", "eager", "sdpa", "fused", "varlen", "flash_attention_2"] = "auto"
    """Attention implementation: one of transformers, or lorafit's own: `fused` for training on a CPU, `varlen` for
    packed rows on a card. `auto`: what is proven and fastest on this model."""
    kernels: Literal["auto", "liger", "none"] = "auto"
    """What computes norms, gated products, rotations and the loss while training on a CUDA GPU: `liger`, the Triton
    kernels of liger-kernel (`pip install 'lorafit[liger]'`); `none`, torch's. `auto`: Liger's where they are installed.
    Each is compared with lorafit's own before step 1, and left out where it differs."""
    quantization: QuantizationChoice = Field(default="nf4", validate_default=True)
    """How the frozen linear weights are stored."""


class SourceSection(Section):
    """One file or hub data set of rows."""

    path: Word = Field(json_schema_extra=PATH_OR_NAME)
    """A file (jsonl, json, csv, tsv, txt, also packed as `.gz`; parquet, xlsx) or a pattern of files such as
    `rows/*.jsonl`, relative to the recipe; or a hub data set's id."""
    format: FormatName = "auto"
    """How a row is read; `auto` looks at the rows."""
    columns: dict[str, str] = Field(default={})
    """`{ours: theirs}`: which of the source's columns holds a field of the format."""
    limit: Count | None = None
    """Rows read from the top, of each file; all where null."""
    split: Word = "train"
    """Split of a hub data set."""
    subset: Word | None = None
    """Configuration of a hub data set."""
    revision: Word | None = None
    """Branch, tag or commit of a hub data set."""


class TrainSourceSection(SourceSection):
    """One file or hub data set of rows. Only training has epochs, so only its sources have `repeats`."""

    repeats: float = Field(default=1.0, gt=0.0, le=1e6)
    """How often an epoch sees this source; 0.5 sees another half of it each epoch."""


def _several(value: Plain) -> Plain:
    """A bare path, or one mapping with a path, stands for a list of one source."""
    if isinstance(value, str) or (isinstance(value, dict) and "path" in value):
        value = [value]
    return [{"path": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value


_Path = Annotated[str, Field(json_schema_extra=PATH_OR_NAME)]
_Short = _Path | SourceSection | Annotated[list[_Path | SourceSection], Field(min_length=1)]
_ShortTrain = _Path | TrainSourceSection | Annotated[list[_Path | TrainSourceSection], Field(min_length=1)]
_Several = BeforeValidator(_several, json_schema_input_type=_Short)
_SeveralTrain = BeforeValidator(_several, json_schema_input_type=_ShortTrain)
Sources = Annotated[list[SourceSection], Field(min_length=1), _Several]
TrainSources = Annotated[list[TrainSourceSection], Field(min_length=1), _SeveralTrain]


class ValidationFraction(Section):
    """Rows held out of the training sources."""

    fraction: float = Field(gt=0.0, lt=1.0)
    """Share of the training rows that is held out (0 to 1), drawn by the seed."""


def _form_of_validation(value: ValidationFraction | Plain) -> str:
    is_share = isinstance(value, ValidationFraction) or (isinstance(value, dict) and "path" not in value)
    return "fraction" if is_share else "sources"


Validation = Annotated[
    Annotated[ValidationFraction, Tag("fraction")] | Annotated[Sources, Tag("sources")],
    Discriminator(_form_of_validation),
]


class BadRowsSection(Section):
    """What happens to malformed, empty and untrainable rows."""

    policy: Literal["error", "skip"] = "error"
    """`error`: the first ones end the run with their line numbers. `skip`: they are left out and counted."""
    max_fraction: float = Field(default=0.05, ge=0.0, le=1.0)
    """With `skip`: the largest share of rows that may be bad (0 to 1)."""


class DataSection(Section):
    """Rows and how they become tokens."""

    train: TrainSources
    """Sources that are trained on."""
    validation: Validation | None = None
    """Scored while training: `{fraction: 0.05}` of the training rows, or sources of their own."""
    test: Sources | None = None
    """Never looked at in training; the final figures come from here."""
    chat_template: Word | None = Field(default=None, json_schema_extra=PATH_OR_NAME)
    """null: the tokenizer's own. Else a shipped name (chatml, hermes, alpaca, plain) or a Jinja file."""
    system_prompt: str | None = None
    """System message for rows that have none."""
    dropped_fields: Literal["error", "warn"] = "error"
    """What happens where the template renders a field of a message nowhere (tool calls, reasoning, names)."""
    train_on: Literal["assistant", "last_turn", "completion", "all"] = "assistant"
    """Which tokens carry loss. A message with `weight: 0` carries none."""
    max_length: int = Field(default=2048, ge=8, le=LARGEST_COUNT)
    """Longest row, in tokens."""
    overlength: Literal["error", "drop", "truncate", "split"] = "error"
    """What happens to longer rows; `split` cuts plain text into several rows."""
    packing: bool | Auto = "auto"
    """Put several short rows into one row of a micro-batch, attention kept inside each. What is learnt stays the same;
    models that would mix them are refused. `auto`: on a card, where `varlen` attention is proven and fastest."""
    augment: AugmentSection | None = None
    """Further copies of the training rows with other phrasings or noisy words in what asks; null: none."""
    bad_rows: BadRowsSection = Field(default={}, validate_default=True)
    """What happens to rows that cannot be trained on."""


class UnfreezingSection(Section):
    """Layers that begin to be trained one part after the other, from the output down."""

    top: Count
    """Layers at the output that are trained from the first step; what stands in no layer is as well."""
    steps: list[Count] = Field(min_length=1)
    """Steps that are the first with an equal part of the other layers, from the top down, e.g. [50, 100]."""

    @field_validator("steps")
    @classmethod
    def _steps_rise(cls, value: list[int]) -> list[int]:
        if value[0] < 2 or any(later <= earlier for earlier, later in pairwise(value)):
            raise ValueError(f"they must rise, from 2 on: {value}")
        return value


class TrainingSection(Section):
    """The optimisation."""

    epochs: float | None = Field(default=None, gt=0.0, le=1e6)
    """Passes over the training rows. Default 3 where max_steps is not set."""
    max_steps: Count | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: Count = 16
    """Examples per optimizer step, over all devices: the number that decides the result."""
    micro_batch_tokens: Count | Auto = "auto"
    """Padded tokens of one forward pass. How a step is cut decides speed and memory, not the result."""
    learning_rate: float = Field(default=2e-4, gt=0.0, le=10.0)
    """Peak learning rate."""
    optimizer: OptimizerChoice = Field(default="adamw", validate_default=True)
    """The optimizer and its own options."""
    schedule: ScheduleChoice = Field(default="cosine", validate_default=True)
    """The learning rate over the run, with its warm-up."""
    max_grad_norm: float | None = Field(default=1.0, gt=0.0, le=1e9)
    """Gradients are scaled down to this norm; null: no clipping."""
    unfreezing: UnfreezingSection | None = None
    """Train the layers at the output first: {top: 4, steps: [50, 100]}; null: all from the first step."""
    curriculum: CurriculumChoice | None = None
    """Easy rows first: {kind: length, easiest: 0.3, until: 0.5}; null: rows of all kinds from the first step."""
    embedding_noise: float | None = Field(default=None, gt=0.0, le=1e4)
    """NEFTune's alpha, e.g. 5: while training, uniform noise of up to alpha / sqrt(L d) on each value of a token's
    embedding, L being the row's real tokens and d the embedding's width; null: none."""
    gradient_checkpointing: Checkpointing | Auto = "auto"
    """Recompute activations in the backward pass: slower, far less memory. `half`: of every second layer. `auto`: only
    where it is needed to fit, and then `half` where that is enough."""
    deterministic: bool = False
    """On a card: take no algorithm whose sums depend on which thread comes first, so that the same run gives the same
    bits on the same card. Attention is slower then and takes more memory. On a CPU runs are repeatable without."""


class EarlyStoppingSection(Section):
    """When to stop before the end."""

    metric: str = "loss"
    """A metric of `evaluation.during`."""
    patience: Count = 3
    """Evaluations without improvement after which the run stops."""
    min_delta: float = Field(default=0.0, ge=0.0, le=1e9)
    """Smallest change that counts as improvement, in the metric's unit."""


class PlateauSection(Section):
    """What follows where the metric that chooses the best checkpoint no longer improves, short of the run's end."""

    patience: Count = 2
    """Evaluations without improvement after which the learning rate falls; then the count begins anew."""
    min_delta: float = Field(default=0.0, ge=0.0, le=1e9)
    """Smallest change that counts as improvement, in the metric's unit."""
    factor: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Multiplier of the learning rate, each time, for the rest of the run."""
    at_most: Count = 3
    """How often that happens; then the rate stays as it is."""
    go_back: bool = False
    """Also go on from weights and optimizer of the best checkpoint. Steps and rows go on as they would have."""


class EvaluationSection(Section):
    """Held-out metrics, while training and at the end."""

    every_steps: Count | None = None
    """Optimizer steps between evaluations on the validation rows; null: none while training."""
    during: list[RepeatedMetricName] = Field(default=list(_USUAL.during_metrics), min_length=1)
    """Metrics while training, the loss always among them. Where a recipe names none: the usual ones of its task."""
    final: list[MetricName] = Field(default=list(_USUAL.final_metrics), min_length=1)
    """Metrics of `lorafit eval`. Where a recipe names none: the usual ones of its task."""
    max_new_tokens: Count = 256
    """Longest generated answer, in tokens."""
    min_new_tokens: int = Field(default=0, ge=0, le=LARGEST_COUNT)
    """No answer ends before it has so many tokens."""
    num_beams: int = Field(default=1, ge=1, le=64)
    """Answers that are kept at each step of a beam search; 1: the likeliest token is taken each time."""
    length_penalty: float = Field(default=1.0, ge=-10.0, le=10.0)
    """Of beam search: an answer's summed log-probability is divided by its tokens to this power, so that more than 0
    favours long answers."""
    no_repeat_ngram_size: int = Field(default=0, ge=0, le=LARGEST_COUNT)
    """No sequence of so many tokens stands twice in an answer; 0: any may."""
    answered_rows: Count = 100
    """Validation rows that are answered at each evaluation while training, the first ones, where a metric of `during`
    reads answers."""
    early_stopping: EarlyStoppingSection | None = None
    """Stop when a metric no longer improves."""
    on_plateau: PlateauSection | None = None
    """Lower the learning rate when the metric no longer improves, which is that of `early_stopping`, or the loss."""
    draws: int = Field(default=4, ge=2, le=100)
    """Answers that are drawn for each row where a metric compares an answer with itself (sampled_similarity)."""
    draw_temperature: float = Field(default=0.7, gt=0.0, le=10.0)
    """Temperature of those draws."""
    encoder: Word | None = Field(default=None, json_schema_extra=PATH)
    """Folder of a sentence encoder such as all-MiniLM-L6-v2, by which metrics compare texts; null: by their letters."""
    retention: Sources | None = None
    """Rows of general ability, scored for base and tuned model: what was forgotten."""


class CheckpointsSection(Section):
    """When the run is saved."""

    every_steps: Count = 50
    """Optimizer steps between checkpoints."""
    keep_last: Count = 2
    """Newest checkpoints kept; the best one is kept beside them."""


class Recipe(Section):
    """One run, whole."""

    name: Word
    """Name of the run; its folder is `runs/NAME` where `output` is not set."""
    task: TaskChoice = Field(default="causal-lm", validate_default=True)
    """What is learnt."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Decides row order, adapter initialisation and dropout."""
    model: ModelSection
    """The frozen base model."""
    adapter: AdapterChoice = Field(default="lora", validate_default=True)
    """What is trained beside it."""
    data: DataSection
    """Rows and how they become tokens."""
    training: TrainingSection = Field(default={}, validate_default=True)
    """The optimisation."""
    evaluation: EvaluationSection = Field(default={}, validate_default=True)
    """Held-out metrics."""
    checkpoints: CheckpointsSection = Field(default={}, validate_default=True)
    """When the run is saved."""
    tracking: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default=[])
    """Trackers that get the metrics, by accelerate; `metrics.jsonl` is always written."""
    output: Line = Field(default="", json_schema_extra=PATH)
    """The run folder, relative to the recipe; `runs/NAME` where empty."""

    @model_validator(mode="before")
    @classmethod
    def _has_the_metrics_of_its_task(cls, values: object) -> object:
        """Metrics that nobody named are those of the task; what is wrong with either is told by its own field."""
        if not isinstance(values, dict):
            return values
        task, evaluation = values.get("task"), values.get("evaluation", {})
        kind = task.get("kind") if isinstance(task, dict) else task
        if kind not in tasks.names() or not isinstance(evaluation, dict):
            return values
        usual = tasks.get(kind)
        named = {"during": list(usual.during_metrics), "final": list(usual.final_metrics), **evaluation}
        return {**values, "evaluation": named}


def sources_of(recipe: Recipe) -> dict[str, Sequence[SourceSection]]:
    """The sources of every split that has its own, by the recipe's key."""
    splits = {
        "data.train": recipe.data.train,
        "data.validation": recipe.data.validation,
        "data.test": recipe.data.test,
        "evaluation.retention": recipe.evaluation.retention,
    }
    return {key: sources for key, sources in splits.items() if isinstance(sources, Sequence)}
