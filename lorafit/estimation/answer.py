"""The figures of `lorafit estimate-memory`, whether a card has what is needed, and all of it as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lorafit.contracts import JsonObject
from lorafit.errors import DoesNotFitError
from lorafit.estimation.compare_methods import Method
from lorafit.estimation.fit import Fit
from lorafit.estimation.ways_to_save import Enough, Saving
from lorafit.facts import Bar, DatasetFacts, DeviceFacts, PictureFacts
from lorafit.machine.devices import format_bytes
from lorafit.machine.hardware import smallest_card
from lorafit.memory import MemoryEstimate, StepMemory, fits
from lorafit.plan.bounds import Bounds
from lorafit.plan.calibration import calibration_memory
from lorafit.plan.recipe_step import HEADROOM
from lorafit.plan.run_cost import RunCost
from lorafit.recipe.schema import Recipe


@dataclass(frozen=True)
class RowLengths:
    """The real rows behind an estimate, or why there are none.

    Attributes:
        facts: Of the rows; None: a row of data.max_length is assumed.
        bars: Rows by length.
        missing: Why there are none.
        pictures: What is assumed of the images of a row where there are none; None where nothing is known of them.
    """

    facts: DatasetFacts | None = None
    bars: tuple[Bar, ...] = ()
    missing: str = ""
    pictures: PictureFacts | None = None


@dataclass(frozen=True)
class Options:
    """What the command line asks beside the recipe.

    Attributes:
        gpu: The card of `--gpu`; None: no verdict.
        headroom: Share of a card's memory that stays free.
        fit: The card of `--fit`.
        price_per_hour: Of the card, in any currency.
        here: This machine, where no card was named and it seems to have none: what `train` would plan for.
    """

    gpu: DeviceFacts | None = None
    headroom: float = HEADROOM
    fit: DeviceFacts | None = None
    price_per_hour: float | None = None
    here: DeviceFacts | None = None

    @property
    def card(self) -> DeviceFacts | None:
        """What the run is planned for."""
        return self.gpu or self.fit


@dataclass(frozen=True)
class Answer:
    """The figures of one recipe.

    Attributes:
        asked: The step as the recipe asks for it.
        memory: What it needs, with checkpointing only where recipe or card want it.
        rows: The real rows, or why there are none.
        without_checkpointing: What the step needs without, where checkpointing was turned on because the card has not
            that much.
        methods: The same model trained otherwise.
        savings: Switches that would save memory, the largest first.
        enough: The cheapest switches with which it would fit, where it does not.
        here: What `train` plans on this machine, where the options ask for it and no dry run is needed.
        exact: The same by a dry run of the whole step, where that was asked; the verdict is its then.
    """

    recipe: Recipe
    asked: StepMemory
    memory: MemoryEstimate
    rows: RowLengths
    options: Options
    without_checkpointing: MemoryEstimate | None
    epochs: float
    cost: RunCost
    methods: tuple[Method, ...]
    savings: tuple[Saving, ...]
    enough: Enough | None
    fit: Fit | None
    here: Bounds | None = None
    exact: MemoryEstimate | None = None

    @property
    def quantization(self) -> str:
        """How the base's weights are stored."""
        return self.recipe.model.quantization.kind

    @property
    def device(self) -> DeviceFacts | None:
        """The card of `--gpu`, else of `--fit`: what all is planned for."""
        return self.options.card

    @property
    def fits(self) -> bool | None:
        """Whether it fits on the card; None where none was named, or it might not, since not all could be counted."""
        device, found = self.device, self.exact or self.memory
        if device is None:
            return None
        needed = (found, *filter(None, [self.calibration]))
        is_enough = all(fits(each, device.memory_bytes, self.options.headroom) for each in needed)
        return None if is_enough and not found.counts_all else is_enough

    @property
    def with_checkpointing_bytes(self) -> int | None:
        """What would be needed with checkpointing, where the recipe leaves it open and no card decided it."""
        is_open = self.asked.checkpointing is None and self.device is None
        return self.asked.at(self.memory.micro_batch_tokens, True).needed_bytes if is_open else None

    @property
    def calibration(self) -> MemoryEstimate | None:
        """What choosing the kinds of linears takes, before the run's own steps; None where nothing is to be chosen."""
        return calibration_memory(self.asked)

    @property
    def needed_bytes(self) -> int:
        """What the card must have: by the dry run of the whole step where it ran."""
        own, calibration = self.exact or self.memory, self.calibration
        return max(own.needed_bytes, 0 if calibration is None else calibration.needed_bytes)

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
        if self.memory.device_kind != "cuda":
            found = "take a machine with more memory"
        bulk = f"{format_bytes(experts)} are experts, which no quantisation reaches; "
        return f"{bulk if experts > self.needed_bytes / 2 else ''}{found}"

    def to_json(self) -> JsonObject:
        """Plain values, sizes in bytes."""
        facts, device, without, here = self.rows.facts, self.device, self.without_checkpointing, self.here
        pictures = self.asked.step.pictures
        return {
            "name": self.recipe.name,
            "model": self.recipe.model.base,
            "dtype": self.asked.step.dtype,
            "quantization": self.quantization,
            "longest_tokens": self.asked.step.row_tokens,
            "rows_known": facts is not None,
            "rows": None
            if facts is None
            else {
                "rows": facts.rows,
                "tokens": facts.tokens,
                "trained_tokens": facts.trained_tokens,
                "longest_tokens": facts.longest_tokens,
                "histogram": [asdict(bar) for bar in self.rows.bars],
            },
            "rows_missing": self.rows.missing or None,
            "pictures": None
            if pictures is None
            else {
                "images": pictures.images(self.memory.micro_batch_tokens),
                "width": pictures.width,
                "height": pictures.height,
                "tokens": pictures.one_tokens,
                "counted": self.memory.counts_pictures,
            },
            "total_parameters": self.asked.step.model.total_parameters,
            "trainable_parameters": self.asked.step.trainable_parameters,
            "memory": self.memory.to_json(),
            "needed_with_checkpointing_bytes": self.with_checkpointing_bytes,
            "here": None
            if here is None
            else {
                "memory": here.memory.to_json(),
                "fits": here.fits,
                "most_needed_bytes": here.memory_at_most.needed_bytes,
            },
            "calibration": None if (calibration := self.calibration) is None else calibration.to_json(),
            "exact": None if self.exact is None else self.exact.to_json(),
            "gpu": None if device is None else {"name": device.name, "memory_bytes": device.memory_bytes},
            "headroom": self.options.headroom,
            "fits": self.fits,
            "needed_without_checkpointing_bytes": None if without is None else without.needed_bytes,
            "savings": [asdict(saving) | {"note": saving.note or None} for saving in self.savings],
            "enough": None if self.enough is None else asdict(self.enough),
            "fit": None if self.fit is None else self.fit.to_json(),
            "epochs": self.epochs if facts is not None else None,
            "cost": self.cost.to_json(),
            "methods": [asdict(method) for method in self.methods],
        }
