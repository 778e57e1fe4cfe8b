"""`lorafit estimate-memory`: what a recipe needs, whether a card has it, what would save memory, and what it costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lorafit.contracts import Printed
from lorafit.errors import DoesNotFitError, UsageError
from lorafit.estimation.compare_methods import Method, compare_methods
from lorafit.estimation.enough import Enough, find_enough
from lorafit.estimation.fit import Fit, find_fit
from lorafit.estimation.ways_to_save import Saving, find_savings
from lorafit.kinds.adapters import adapters
from lorafit.machine.devices import format_bytes
from lorafit.machine.hardware import smallest_card
from lorafit.memory import ExactEstimate, MemoryEstimate, fits
from lorafit.plan.derive import HEADROOM, run_epochs
from lorafit.plan.run_cost import RunCost, cost_of_run
from lorafit.plan.step_memory import MemoryQuestion, estimated_attention, resolve_dtype
from lorafit.plan.unpacked import decide_unpacked

if TYPE_CHECKING:
    from rich.console import Console

    from lorafit.facts import DatasetFacts, DeviceFacts, ModelShape
    from lorafit.recipe.schema import Recipe

MOST_HEADROOM = 0.9


@dataclass(frozen=True)
class RowLengths:
    """The real rows behind an estimate, or why there are none.

    Attributes:
        facts: Of the rows; None: a row of data.max_length is assumed.
        bars: Rows by length: (from, to, rows), both ends included.
        missing: Why there are none.
    """

    facts: DatasetFacts | None = None
    bars: tuple[tuple[int, int, int], ...] = ()
    missing: str = ""


@dataclass(frozen=True)
class Options:
    """What the command line asks beside the recipe.

    Attributes:
        gpu: The card of `--gpu`; None: no verdict.
        headroom: Share of a card's memory that stays free.
        fit: The card of `--fit`.
        price_per_hour: Of the card, in any currency.
    """

    gpu: DeviceFacts | None = None
    headroom: float = HEADROOM
    fit: DeviceFacts | None = None
    price_per_hour: float | None = None

    @property
    def card(self) -> DeviceFacts | None:
        """What the run is planned for."""
        return self.gpu or self.fit


@dataclass(frozen=True)
class RecipeEstimate(Printed):
    """The answer of `estimate-memory`.

    Attributes:
        max_length: Of the recipe.
        rows: The real rows, or why there are none.
        without_checkpointing: What the step needs without, where checkpointing was turned on because the card has not
            that much.
        methods: The same model trained otherwise.
        savings: Switches that would save memory, the largest first.
        enough: The cheapest switches with which it would fit, where it does not.
        question: What the estimate answers, for the exact engine to answer too.
        exact: Its answer, where it was asked.
    """

    name: str
    model: str
    memory: MemoryEstimate
    dtype: str
    quantization: str
    longest_tokens: int
    max_length: int
    rows: RowLengths
    total_parameters: int
    trainable_parameters: int
    options: Options
    without_checkpointing: MemoryEstimate | ExactEstimate | None
    epochs: float
    cost: RunCost
    methods: tuple[Method, ...]
    savings: tuple[Saving, ...]
    enough: Enough | None
    fit: Fit | None
    question: MemoryQuestion
    exact: ExactEstimate | None = None

    @property
    def device(self) -> DeviceFacts | None:
        """The card of `--gpu`, else of `--fit`: what all is planned for."""
        return self.options.card

    @property
    def needs_dry_run(self) -> bool:
        """Whether the closed form cannot say if it fits: it does not count what some layers of the model hold."""
        return self.device is not None and self.question.shape.scanning_layers > 0

    @property
    def fits(self) -> bool | None:
        """Whether it fits on the card; None where none was named, or the closed form is too low and no dry run ran."""
        device = self.device
        found = None if device is None else fits(self.exact or self.memory, device.memory_bytes, self.options.headroom)
        return None if found and self.needs_dry_run and self.exact is None else found

    @property
    def with_checkpointing_bytes(self) -> int | None:
        """What would be needed with checkpointing, where the recipe leaves it open and no card decided it."""
        is_open = self.question.recipe.training.gradient_checkpointing == "auto" and self.device is None
        return self.question.at(self.memory.micro_batch_tokens, True).needed_bytes if is_open else None

    @property
    def needed_bytes(self) -> int:
        """What the card must have: by the exact engine where it ran."""
        return (self.exact or self.memory).needed_bytes

    def render(self, console: Console) -> None:
        """The tables for people."""
        from lorafit.estimation.table import print_estimate

        print_estimate(self, console)

    def raise_unless_fits(self) -> None:
        """For `--gpu` and `--fit`.

        Raises:
            DoesNotFitError: It does not fit on the card, or nothing at all does.
        """
        if self.fits is None and self.options.gpu is not None:
            raise DoesNotFitError(
                f"cannot be told whether it fits: needs more than {format_bytes(self.needed_bytes)}, layers that carry "
                "a state are not counted, and the model does not run on tensors without values",
                key="--gpu",
                todo="try a few steps: lorafit train --set training.max_steps=2",
            )
        if self.fits is False and self.options.gpu is not None:
            device, enough = self.options.gpu, self.enough
            hopeless = f"no three switches are enough, {self.larger}"
            if self.needs_dry_run:
                tries = [saving.switch for saving in self.savings[:2]]
                hopeless = f"try {' or '.join(tries)}; {self.larger}" if tries else self.larger
            raise DoesNotFitError(
                f"does not fit: needs {format_bytes(self.needed_bytes)}, {device.name} has "
                f"{format_bytes(device.memory_bytes)} usable, of which {self.options.headroom:.0%} stay free",
                key="--gpu",
                todo=hopeless if enough is None else f"it would fit with {enough.shown}",
            )
        if self.fit is not None and self.fit.nothing_fits:
            device = self.fit.device
            raise DoesNotFitError(
                f"nothing fits: not even a row of {self.fit.row.least} tokens or rank 1, in "
                f"{format_bytes(device.memory_bytes)} usable, of which {self.fit.headroom:.0%} stay free",
                key="--fit",
                todo=self.larger if self.quantization in ("nf4", "fp4") else f"quantise the model: {self.larger}",
            )

    @property
    def larger(self) -> str:
        """What has as much as the recipe needs as it is, and why it needs that."""
        card, experts = smallest_card(self.needed_bytes, self.options.headroom), self.memory.unquantized_expert_bytes
        found = f"the smallest known card with {format_bytes(self.needed_bytes)} is {card['names'][0]}" if card else ""
        found = found or "no single card of configs/hardware has that much"
        if self.question.device_kind != "cuda":
            found = "take a machine with more memory"
        bulk = f"{format_bytes(experts)} are experts, which no quantisation reaches; "
        return f"{bulk if experts > self.needed_bytes / 2 else ''}{found}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, sizes in bytes."""
        facts, device, without = self.rows.facts, self.device, self.without_checkpointing
        return {
            "name": self.name,
            "model": self.model,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "longest_tokens": self.longest_tokens,
            "rows_known": facts is not None,
            "rows": None
            if facts is None
            else {
                "rows": facts.rows,
                "tokens": facts.tokens,
                "trained_tokens": facts.trained_tokens,
                "longest_tokens": facts.longest_tokens,
                "histogram": [{"low": low, "high": high, "rows": rows} for low, high, rows in self.rows.bars],
            },
            "rows_missing": self.rows.missing or None,
            "total_parameters": self.total_parameters,
            "trainable_parameters": self.trainable_parameters,
            "memory": self.memory.to_json(),
            "needed_with_checkpointing_bytes": self.with_checkpointing_bytes,
            "exact": None if self.exact is None else self.exact.to_json(),
            "gpu": None if device is None else {"name": device.name, "memory_bytes": device.memory_bytes},
            "headroom": self.options.headroom,
            "fits": self.fits,
            "needed_without_checkpointing_bytes": None if without is None else without.needed_bytes,
            "savings": [
                {"switch": one.switch, "saved_bytes": one.saved_bytes, "fits": one.fits, "note": one.note or None}
                for one in self.savings
            ],
            "enough": None if self.enough is None else asdict(self.enough),
            "fit": None if self.fit is None else self.fit.to_json(),
            "epochs": self.epochs if facts is not None else None,
            "cost": self.cost.to_json(),
            "methods": [method.to_json() for method in self.methods],
        }


def check_headroom(headroom: float | None, device: DeviceFacts | None) -> float:
    """The share that stays free: the default where none is given.

    Raises:
        UsageError: It is no share, or there is no card of which it could be one.
    """
    if headroom is None:
        return HEADROOM
    if not 0.0 <= headroom <= MOST_HEADROOM:  # NaN too
        todo = f"a share lies in the range 0 to {MOST_HEADROOM}"
        raise UsageError(f"{headroom} is out of range", key="--headroom", todo=todo)
    if device is None:
        raise UsageError("a headroom needs a card", key="--headroom", todo="name one with --gpu or --fit")
    return headroom


def estimate_recipe(
    recipe: Recipe, shape: ModelShape, rows: RowLengths = RowLengths(), options: Options = Options()
) -> RecipeEstimate:
    """What a recipe needs.

    Where micro_batch_tokens is `auto`, one longest row is assumed; where gradient_checkpointing is, none, unless the
    card of `--gpu` needs it.

    Args:
        recipe: The recipe.
        shape: Its model.
        rows: The real rows; without them a row of data.max_length is assumed, of which every token may carry loss.
        options: Of the command line.

    Raises:
        RecipeError: The adapter's targets match nothing, or sdpa was asked of a model with a soft-cap.
    """
    headroom, device, facts = options.headroom, options.card, rows.facts
    question = _ask(recipe, shape, facts, device, headroom)
    memory, without = _answer(question, device, headroom)
    tokens, checkpointing = memory.micro_batch_tokens, memory.gradient_checkpointing
    trainable = sum(site.parameters for site in adapters.bind(recipe.adapter).sites(shape)) + shape.new_head_parameters
    epochs = run_epochs(recipe, facts.rows) if facts is not None else 0.0
    counted_on = None if shape.scanning_layers else device  # a figure that is too low fits nowhere
    return RecipeEstimate(
        name=recipe.name,
        model=recipe.model.base,
        memory=memory,
        dtype=question.dtype,
        quantization=recipe.model.quantization.kind,
        longest_tokens=question.longest_tokens,
        max_length=recipe.data.max_length,
        rows=rows,
        total_parameters=shape.total_parameters,
        trainable_parameters=trainable,
        options=options,
        without_checkpointing=without,
        epochs=epochs,
        cost=cost_of_run(
            shape,
            facts,
            row_tokens=question.longest_tokens,
            epochs=epochs,
            adapter_parameters=trainable,
            checkpointing=checkpointing,
            device=device,
            dtype=question.dtype,
            price_per_hour=options.price_per_hour,
        ),
        methods=compare_methods(question, tokens, checkpointing, counted_on, headroom),
        savings=find_savings(question, tokens, checkpointing, counted_on, headroom),
        enough=_find_enough(question, memory, facts, device, headroom),
        fit=_fit(recipe, shape, facts, options),
        question=question,
    )


def _answer(
    question: MemoryQuestion, device: DeviceFacts | None, headroom: float
) -> tuple[MemoryEstimate, MemoryEstimate | None]:
    """What a step needs; and what it would without checkpointing, where the card has that turned on."""
    training, longest = question.recipe.training, question.longest_tokens
    asked = training.micro_batch_tokens
    tokens = longest if asked == "auto" else max(int(asked), longest)
    if training.gradient_checkpointing != "auto":
        return question.at(tokens, bool(training.gradient_checkpointing)), None
    plain = question.at(tokens, False)
    if device is None or fits(plain, device.memory_bytes, headroom):
        return plain, None
    return question.at(tokens, True), plain


def _find_enough(
    question: MemoryQuestion,
    memory: MemoryEstimate,
    facts: DatasetFacts | None,
    device: DeviceFacts | None,
    headroom: float,
) -> Enough | None:
    if device is None or question.shape.scanning_layers or fits(memory, device.memory_bytes, headroom):
        return None

    def estimate(changed: Recipe) -> MemoryEstimate:
        cut = facts and replace(
            facts,
            longest_tokens=min(facts.longest_tokens, changed.data.max_length),
            longest_trained_tokens=min(facts.longest_trained_tokens, changed.data.max_length),
        )
        return _answer(_ask(changed, question.shape, cut, device, headroom), device, headroom)[0]

    def holds(found: MemoryEstimate) -> bool:
        return fits(found, device.memory_bytes, headroom)

    return find_enough(question.recipe, question.shape, question.longest_tokens, estimate, holds)


def _ask(
    recipe: Recipe, shape: ModelShape, facts: DatasetFacts | None, device: DeviceFacts | None, headroom: float
) -> MemoryQuestion:
    longest = facts.longest_tokens if facts else min(recipe.data.max_length, shape.max_positions)
    question = MemoryQuestion(
        recipe=recipe,
        shape=shape,
        longest_tokens=longest,
        longest_trained_tokens=facts.longest_trained_tokens if facts else longest,
        dtype=resolve_dtype(recipe.model.dtype, device),
        attention=estimated_attention(recipe, shape),
        device_kind=device.kind if device else "cuda",
    )
    return decide_unpacked(question, device, headroom)


def _fit(recipe: Recipe, shape: ModelShape, facts: DatasetFacts | None, options: Options) -> Fit | None:
    if options.fit is None or shape.scanning_layers:
        return None
    question = _ask(recipe, shape, facts, options.fit, options.headroom)
    asked = recipe.training.micro_batch_tokens
    tokens = question.longest_tokens if asked == "auto" else max(int(asked), question.longest_tokens)
    return find_fit(question, tokens, options.fit, options.headroom)
