"""The plan: every number that follows from a recipe and from facts, and nothing that has to be measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from lorafit.console.wording import counted
from lorafit.contracts import JsonObject
from lorafit.errors import DataError, DoesNotFitError, RecipeError
from lorafit.facts import DatasetFacts, DeviceFacts, LeftOut, ModelShape
from lorafit.kinds.adapters import adapters
from lorafit.kinds.metrics import metrics
from lorafit.kinds.schedules import warmup_steps
from lorafit.machine.devices import format_bytes
from lorafit.memory import Engine, MemoryEstimate, StepMemory, StepShape, closed_form
from lorafit.ops.attention_kernels import VARLEN
from lorafit.ops.kernel_choice import check_kernels
from lorafit.ops.recomputed_layers import Checkpointing
from lorafit.plan.bounds import memory_bounds
from lorafit.plan.calibration import calibration_memory, require_calibration_fit
from lorafit.plan.curriculum import PacedSteps, pace_steps
from lorafit.plan.methods import describe_methods
from lorafit.plan.recipe_step import HEADROOM, asks_to_keep, recipe_step, takes_varlen
from lorafit.plan.warnings import plan_warnings
from lorafit.recipe.schema import Recipe

DEFAULT_EPOCHS = 3.0


@dataclass(frozen=True)
class Plan:
    """Every number of a run before it starts: values, and bounds where the first steps will pick.

    Attributes:
        epochs: Passes over the training rows that `total_steps` make.
        warmup_steps: Steps in which the learning rate climbs.
        dtype: `bf16`, `fp16` or `fp32`.
        keeps_unpacked: Whether adapted 4-bit weights keep their dequantised copy for the whole run.
        attention: As the recipe says; `auto` is left open.
        kernels: `none` or `liger`: what computes norms, products and losses, if it proves right.
        packing: Whether several documents share a row; None: under attention that is made for it.
        gradient_checkpointing: Where recipe or memory decide it; None where several of its values can fit.
        micro_batch_tokens: As the recipe says; None: the first steps choose between the bounds.
        min_micro_batch_tokens: One longest row.
        max_micro_batch_tokens: What fits, at most a whole step of this rank.
        answered_rows: Validation rows that are answered at each evaluation; 0 where no metric reads answers.
        answer_tokens: The most tokens that these answers can have.
        answer_beams: Beams of each answer; every one of them may write as many.
        select_metric: The metric that chooses the best checkpoint; None: the last one is taken.
        without_adapter: Weights of the layers that no adapter can reach, by name.
        memory: The estimate for the smallest micro-batch, with as little checkpointing as fits.
        memory_at_most: The estimate for the largest micro-batch within the bounds.
        memory_least: The least this run can need: one longest row, checkpointed.
        fits: Whether `memory_least` fits.
        warnings: What a user should know before the run.
        step: Answers for the memory of a step, by micro-batch and checkpointing.
        curriculum: Which steps are drawn from the easiest rows; None where none are.
        methods: The adapter's kind and options in words, and what else decides what is trained when.
    """

    name: str
    model: str
    rows: int
    tokens: int
    trained_tokens: int
    longest_tokens: int
    classes: Mapping[str, int]
    class_weights: Mapping[str, float]
    validation_rows: int
    batch_size: int
    steps_per_epoch: int
    total_steps: int
    epochs: float
    warmup_steps: int
    learning_rate: float
    schedule: str
    optimizer: str
    dtype: str
    compute_dtype: str
    quantization: str
    keeps_unpacked: bool
    attention: str
    kernels: str
    packing: bool | None
    gradient_checkpointing: Checkpointing | None
    micro_batch_tokens: int | None
    min_micro_batch_tokens: int
    max_micro_batch_tokens: int
    evaluate_every_steps: int | None
    save_every_steps: int
    keep_last: int
    answered_rows: int
    answer_tokens: int
    answer_beams: int
    select_metric: str | None
    total_parameters: int
    trainable_parameters: int
    without_adapter: tuple[LeftOut, ...]
    device: DeviceFacts
    memory: MemoryEstimate
    memory_at_most: MemoryEstimate
    memory_least: MemoryEstimate
    fits: bool
    warnings: tuple[str, ...]
    step: StepMemory
    curriculum: PacedSteps | None = None
    methods: Mapping[str, str] = field(default_factory=dict)

    @property
    def may_let_go_of_unpacked(self) -> bool:
        """Whether copies are given up where memory runs out: the recipe leaves them open."""
        return self.keeps_unpacked and asks_to_keep(self.step.step.quantization.section) is None

    @property
    def may_recompute_more(self) -> bool:
        """Whether more layers are checkpointed than planned where memory runs out: the recipe leaves it open."""
        return self.step.checkpointing is None

    @property
    def loss_chunk_bytes(self) -> int | None:
        """Of fp32 logits that the loss holds at once; None: as many as are usual on the device."""
        return self.step.step.loss_chunk_bytes

    @property
    def calibration(self) -> MemoryEstimate | None:
        """What choosing the kinds of linears takes before the run's own memory; None where nothing is to be chosen."""
        return calibration_memory(self.step)

    @property
    def trained_share(self) -> float:
        """Share of tokens that carry loss (0 to 1)."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    def to_json(self) -> JsonObject:
        """Plain values."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "step"}
        may_be_open = ("packing", "gradient_checkpointing", "micro_batch_tokens")
        open_values = {name: "auto" for name in may_be_open if plain[name] is None}
        device = {f.name: getattr(self.device, f.name) for f in fields(self.device)}
        estimates = {k: v.to_json() for k, v in plain.items() if isinstance(v, MemoryEstimate)}
        own = {
            "device": device,
            "without_adapter": [asdict(part) for part in self.without_adapter],
            "warnings": list(self.warnings),
            "trained_share": self.trained_share,
            "curriculum": None if self.curriculum is None else asdict(self.curriculum),
            **({} if (calibration := self.calibration) is None else {"calibration": calibration.to_json()}),
        }
        return plain | open_values | estimates | own


def plan(
    recipe: Recipe, shape: ModelShape, dataset: DatasetFacts, device: DeviceFacts, engine: Engine = closed_form
) -> Plan:
    """Derives every number of a run; `engine` answers for the memory of its step.

    Raises:
        RecipeError: Numbers of the recipe do not go together, with the rows and the model it names.
        DataError: There is no row to train on.
    """
    if dataset.rows < 1 or dataset.trained_tokens < 1:
        raise DataError("no row with a trained token is left to train on", key="data.train", todo="see lorafit preview")
    training, evaluation = recipe.training, recipe.evaluation
    steps_per_epoch = math.ceil(dataset.rows / training.batch_size)
    total_steps, epochs = _length(recipe, steps_per_epoch)
    if why := adapters.bind(recipe.adapter).refuses_steps(total_steps):
        raise RecipeError(why, key="adapter", todo="train more steps, or lower the adapter's")
    _check_unfreezing(recipe, total_steps)
    memory = recipe_step(recipe, shape, dataset, device, engine=engine)
    step = memory.step
    _check_attention(recipe, device, step)
    check_kernels(recipe.model.kernels, device.kind)
    _check_length(dataset, step)
    bounds = memory_bounds(memory, min(training.batch_size, dataset.rows), device)
    stopping = evaluation.early_stopping
    reads_answers = any(metrics.get(name).needs != "scores" for name in evaluation.during)
    answers = reads_answers and evaluation.every_steps is not None
    answered_rows = min(evaluation.answered_rows, dataset.validation_rows) if answers else 0
    return Plan(
        name=recipe.name,
        model=recipe.model.base,
        rows=dataset.rows,
        tokens=dataset.tokens,
        trained_tokens=dataset.trained_tokens,
        longest_tokens=dataset.longest_tokens,
        classes=dataset.classes,
        class_weights=dataset.class_weights,
        validation_rows=dataset.validation_rows,
        batch_size=training.batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        epochs=epochs,
        warmup_steps=_warmup(recipe, total_steps),
        learning_rate=training.learning_rate,
        schedule=training.schedule.kind,
        optimizer=training.optimizer.kind,
        dtype=step.dtype,
        compute_dtype=step.compute_dtype,
        quantization=recipe.model.quantization.kind,
        keeps_unpacked=step.keeps_unpacked,
        attention=recipe.model.attention,
        kernels=step.kernels,
        packing=step.packing,
        gradient_checkpointing=bounds.checkpointing,
        micro_batch_tokens=memory.tokens,
        min_micro_batch_tokens=bounds.least_tokens,
        max_micro_batch_tokens=bounds.most_tokens,
        evaluate_every_steps=evaluation.every_steps,
        save_every_steps=recipe.checkpoints.every_steps,
        keep_last=recipe.checkpoints.keep_last,
        answered_rows=answered_rows,
        answer_tokens=answered_rows * evaluation.max_new_tokens,
        answer_beams=evaluation.num_beams,
        select_metric=stopping.metric if stopping else ("loss" if evaluation.every_steps else None),
        total_parameters=shape.total_parameters,
        trainable_parameters=step.trainable_parameters,
        without_adapter=shape.left_out,
        device=device,
        memory=bounds.memory,
        memory_at_most=bounds.memory_at_most,
        memory_least=bounds.memory_least,
        fits=bounds.fits,
        warnings=plan_warnings(recipe, memory, dataset, device, total_steps),
        step=memory,
        curriculum=pace_steps(recipe, dataset.rows, steps_per_epoch, total_steps),
        methods=describe_methods(recipe),
    )


def require_fit(plan: Plan) -> None:
    """Called before any weight is loaded.

    Raises:
        DoesNotFitError: Not even one longest row with as much checkpointing as can be fits on the device; or not the
            unquantised base, where calibration rows are to say how its linears are stored.
    """
    if plan.fits:
        require_calibration_fit(plan.step, plan.device, HEADROOM)
        return
    need, have = plan.memory_least.needed_bytes, plan.device.memory_bytes
    how = "with" if plan.memory_least.gradient_checkpointing else "without"
    raise DoesNotFitError(
        f"one row of {plan.longest_tokens} tokens {how} checkpointing needs {format_bytes(need)} of memory; "
        f"{plan.device.name} has {format_bytes(have)}, of which {HEADROOM:.0%} stay free",
        todo="lower data.max_length or adapter.r, quantise the model, or take more memory; see lorafit estimate-memory",
    )


def _length(recipe: Recipe, steps_per_epoch: int) -> tuple[int, float]:
    """Optimizer steps in all, and how many epochs they are; a part of an epoch is rounded up to whole steps."""
    training = recipe.training
    if training.max_steps is not None:
        return training.max_steps, training.max_steps / steps_per_epoch
    epochs = DEFAULT_EPOCHS if training.epochs is None else training.epochs
    # a millionth of a step is rounding of the product, not a step
    return max(1, math.ceil(epochs * steps_per_epoch - 1e-6)), epochs


def run_epochs(recipe: Recipe, rows: int) -> float:
    """Passes over `rows` that the run makes, parts included."""
    return _length(recipe, math.ceil(rows / recipe.training.batch_size))[1]


def _warmup(recipe: Recipe, total_steps: int) -> int:
    asked = recipe.training.schedule.warmup_steps
    if asked is not None and asked > total_steps:
        raise RecipeError(
            f"warmup_steps {asked} is more than the {counted(total_steps, 'step')} of the run",
            key="training.schedule.warmup_steps",
            todo="lower it, or use warmup_ratio",
        )
    return warmup_steps(recipe.training.schedule, total_steps)


def _check_unfreezing(recipe: Recipe, total_steps: int) -> None:
    unfreezing = recipe.training.unfreezing
    if unfreezing is not None and unfreezing.steps[-1] > total_steps:
        what = f"ends at step {unfreezing.steps[-1]}, and the run has {total_steps}: some layers would never be trained"
        raise RecipeError(what, key="training.unfreezing.steps", todo="lower them, or train more steps")


def _check_attention(recipe: Recipe, device: DeviceFacts, step: StepShape) -> None:
    if recipe.model.attention == VARLEN and not takes_varlen(step):
        what = "varlen attention needs a card of compute capability 8.0, bf16 or fp16, and a model that drops no scores"
        raise RecipeError(what, key="model.attention", todo="write auto")
    if recipe.model.attention == "flash_attention_2" and device.kind == "cpu":
        raise RecipeError("flash_attention_2 runs on no CPU", key="model.attention", todo="write sdpa or auto")
    if recipe.model.attention == "fused" and device.kind != "cpu":
        raise RecipeError("fused attention is for CPUs", key="model.attention", todo="write sdpa or auto")


def _check_length(dataset: DatasetFacts, step: StepShape) -> None:
    shape, task = step.model, step.task
    longest = dataset.longest_sequence_tokens
    if shape.position_parameters and longest > shape.max_positions:
        raise RecipeError(
            f"the longest row has {longest} tokens; {shape.model_type} has {shape.max_positions} learned positions",
            key="data.max_length",
            todo=f"set it to {shape.max_positions // task.pads_to * task.pads_to} or less",
        )
