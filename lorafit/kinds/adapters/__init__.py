"""Parameter-efficient methods: what is trained beside the frozen base, and how that is folded into it.

An instance, from `adapters.bind(section)`, says what a recipe asks for: its sites, and PEFT's config of them. The
classmethods are about an adapter on disk, which may be another tool's and has no recipe: `adapter_kind` finds the class
by its adapter_config.json. Members stand in the order in which they are asked:

    recipe and plan    sites, rank, closed_form, refuses, refuses_steps, refuses_unfreezing
    a fresh adapter    linear_names, peft_config, fit; PEFT wraps the model; mend, settle      model/attach.py
    a run              initialisation before step 1, rate_factors, step_hook                   run/assembly.py
    saving             live_tensors, derived_tensors; finished for a run's result, outcome     model/adapter.py
    opening            opens, refuses_saved, differences, opened_config; PEFT wraps; reopen, mend; take_tensors
    what is done with a saved one    why_no_effect, nested_from (trim), folding (merge)
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from lorafit.contracts import JsonMapping, JsonObject, JsonValue
from lorafit.kinds.adapters._saved import named_on_disk, trained_values
from lorafit.kinds.registry import Kind, S_co, SectionRegistry
from lorafit.kinds.section import PATH, KindSection

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence, Set

    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from lorafit.facts import ModelShape, RunFacts
    from lorafit.kinds.adapter_parts import CopiedModules, Outcome, SavedField, Site
    from lorafit.kinds.folding import Folding
    from lorafit.kinds.initialisations import Initialisation, InitialisationSection
    from lorafit.kinds.quantizations import Quantization
    from lorafit.ops.step_hook import StepHook


class AdapterSection(KindSection):
    """What every adapter's section has."""

    init_from: str | None = Field(default=None, json_schema_extra=PATH)
    """Folder of an adapter to go on from, relative to the recipe; r, alpha and targets must agree with it."""


class Adapter(Kind[S_co]):
    """One method.

    Attributes:
        starts_as_base: Whether a fresh one computes what the base does, to the last bit, as PEFT makes it; see
            `begins_as_base`.
        saved_as: The kind by which a saved one is opened, where it trains another kind's adapter in a way of its own.
        peft_type: What `peft_type` in adapter_config.json says.
        peft_options: Keys of adapter_config.json, with the values that tell it from others of the same `peft_type`.
        saved_fields: Checks of its own keys of adapter_config.json.
        recipe_fields: Those that an adapter to go on from must share with the recipe, with their names there.
        form_fields: Those that say what its tensors mean, which it must share too.
        resumed_prefix: Begin of the names of tensors that are saved for training to go on with, and that an opened
            adapter does without.
        no_checkpointing: Why no layer can run forward again in the backward pass; None where all can.
        unread: Values of options, `section.option=value`, that it can do nothing with, each with the reason; as a
            task's.
        copies: Which modules it goes on, in the place of linears.
        usual_rate: The learning rate that it wants, as a multiple of LoRA's: the middle of what `compare` tries.
    """

    starts_as_base: ClassVar[bool] = False
    saved_as: ClassVar[str | None] = None
    peft_type: ClassVar[str]
    peft_options: ClassVar[Mapping[str, JsonValue]] = {}
    saved_fields: ClassVar[Mapping[str, SavedField]] = {}
    recipe_fields: ClassVar[Mapping[str, str]] = {}
    form_fields: ClassVar[Sequence[str]] = ()
    resumed_prefix: ClassVar[str | None] = None
    no_checkpointing: ClassVar[str | None] = None
    unread: ClassVar[Mapping[str, str]] = {}
    copies: ClassVar[CopiedModules | None] = None
    usual_rate: ClassVar[float] = 1.0

    @abstractmethod
    def sites(self, shape: ModelShape) -> tuple[Site, ...]:
        """Where it trains what. Raises RecipeError where a name of the recipe matches nothing."""

    def rank(self) -> int:
        """Width of the bottleneck, which the activations of the closed form grow with; 0 for a method without."""
        return 0

    @property
    def closed_form(self) -> bool:
        """Whether `memory` has formulas for its step, LoRA's with one rank beside every such linear; else a dry run."""
        return False

    def refuses(self, quantization_kind: str) -> str | None:
        """Why it cannot be trained beside linears stored so, in one sentence with the reason; None where it can.

        Args:
            quantization_kind: How a single linear is stored, e.g. `none`, `nf4`, `int8`.
        """
        return self.refuses_saved({}, quantization_kind)

    def refuses_steps(self, total_steps: int) -> str | None:
        """Why it cannot be trained in so many steps, in one sentence without an end; None where it can."""
        return None

    def refuses_unfreezing(self) -> str | None:
        """Why its layers cannot begin to be trained one after the other, in one sentence; None where they can."""
        return None if self.linear_names() else "trains nothing in single layers"

    def linear_names(self) -> Literal["all-linear"] | Sequence[str]:
        """Names of the linears it goes on, as the recipe writes them; none for a method without."""
        names: Literal["all-linear"] | Sequence[str] = getattr(self.section, "target_modules", ())
        return names

    @abstractmethod
    def peft_config(self, target_modules: Sequence[str], *, is_transposed: bool) -> PeftConfig:
        """PEFT's config of a fresh adapter.

        Args:
            target_modules: Names by which PEFT finds exactly the linears of `linear_names` in the loaded model.
            is_transposed: Whether their weights lie `[in, out]`.
        """

    def fit(self, config: PeftConfig, model: PreTrainedModel, layers: Mapping[str, int]) -> None:
        """Writes into PEFT's config, in place, what the model decides: what differs by layer, and what PEFT would not
        find in every model by itself.

        Args:
            config: From `peft_config`.
            model: Loaded or on the meta device.
            layers: The number of each layer that the recipe chooses, by its path.

        Raises:
            RecipeError: The method is not for this model.
        """

    @classmethod
    def mend(cls, model: PeftModel) -> None:
        """Puts right what PEFT's layers of the method do wrong, in a model that PEFT has just wrapped for one."""

    def settle(self, model: PeftModel) -> None:
        """Freezes, ties or changes in a model whose adapter is fresh what PEFT's config cannot say.

        What requires a gradient afterwards is trained; what `live_tensors` names is saved.
        """

    def initialisation(self) -> Initialisation[InitialisationSection] | None:
        """What gives it its first values before step 1; None where they are those that it is made with."""
        return None

    def rate_factors(self) -> Mapping[str, float]:
        """What the learning rate is multiplied by, for parameters whose name holds a text; 1 for all others."""
        return {}

    def rate_factor(self, parameter_name: str) -> float:
        """What the learning rate of a trained parameter is multiplied by."""
        return next((factor for part, factor in self.rate_factors().items() if part in parameter_name), 1.0)

    def step_hook(self, model: PeftModel, run: RunFacts) -> StepHook | None:
        """What the method does between the steps of a run on its fresh adapter; None for most."""
        return None

    @property
    def acts_between_steps(self) -> bool:
        """Whether it has a `step_hook`."""
        return type(self).step_hook is not Adapter.step_hook

    @classmethod
    def live_tensors(cls, model: PeftModel, name: str) -> dict[str, torch.Tensor]:
        """What is saved of an adapter by the names it has on disk, all in place but for what `take_tensors` knows."""
        return named_on_disk(model, name, trained_values(model, name))

    @classmethod
    def derived_tensors(cls, model: PeftModel, name: str) -> dict[str, torch.Tensor]:
        """What is computed of the trained parameters and saved beside them, for whoever opens the adapter."""
        return {}

    @classmethod
    def finished(
        cls, config: JsonMapping, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[JsonObject, dict[str, torch.Tensor]] | None:
        """What a run's result says and holds, where that is not what its checkpoints do; None for most."""
        return None

    def outcome(self, config: JsonMapping, step: int, total_steps: int) -> Outcome | None:
        """What became of it in a run; None for most, of which the recipe says all.

        Args:
            config: adapter_config.json of the run's result.
            step: Whose adapter that is.
            total_steps: Of the run.
        """
        return None

    @classmethod
    def opens(cls, peft_type: object) -> bool:
        """Whether saved adapters of that `peft_type` may be of this method; `peft_options` tell the rest."""
        return peft_type == cls.peft_type

    @classmethod
    def refuses_saved(cls, config: JsonMapping, quantization_kind: str) -> str | None:
        """Why a saved adapter cannot be opened beside linears stored so; as `refuses`, for an adapter_config.json."""
        return None

    @classmethod
    def refuses_caching(cls, config: JsonMapping) -> str | None:
        """Why no answer can be written with a saved one token by token, from what a cache keeps of the text before, in
        one sentence; None where it can."""
        return None

    @classmethod
    def differences(cls, saved: JsonMapping, fresh: JsonMapping) -> list[str]:
        """Keys in which the adapter_config.json to go on from says another form than that of a fresh adapter."""
        return [key for key in cls.form_fields if (value := saved.get(key)) and value != fresh.get(key)]

    @classmethod
    def opened_config(cls, config: JsonMapping) -> JsonObject:
        """What PEFT's config is made of when a saved adapter is opened, from adapter_config.json."""
        return dict(config)

    @classmethod
    def reopen(cls, model: PeftModel, name: str, tensors: Collection[str]) -> None:
        """Changes what PEFT has put into a model for a saved adapter, before its values are loaded: shapes that its
        config does not tell, parameters that were not trained.

        Args:
            model: PEFT's.
            name: The adapter's.
            tensors: Names of the saved tensors.
        """

    @classmethod
    def take_tensors(cls, model: PeftModel, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts values where `live_tensors` gave a copy of several parameters; most methods have all in place."""

    @classmethod
    def why_no_effect(cls, config: JsonMapping, nonzero_tensors: Set[str]) -> str | None:
        """Why a saved adapter changes nothing; None where it may change something.

        Args:
            config: adapter_config.json.
            nonzero_tensors: Its tensors that hold more than zeros.
        """
        return None

    def nested_from(self) -> int | None:
        """The least rank k of which its first k ranks, with the same alpha, are a trained adapter; None: of no k."""
        return None

    @classmethod
    @abstractmethod
    def folding(cls, config: JsonMapping) -> Folding:
        """How an adapter of this adapter_config.json is folded into its base.

        Raises:
            ModelError: It is no change of weights; the message says why in one sentence.
        """


adapters: SectionRegistry[Adapter[AdapterSection]] = SectionRegistry("adapter", "lorafit.kinds.adapters")


def adapter_kind(config: JsonMapping) -> type[Adapter[AdapterSection]] | None:
    """The method of an adapter_config.json: of those of its `peft_type` the one whose options fit most closely.

    An option that is missing there is one that is off.
    """
    fitting = [
        kind
        for _, kind in adapters.items()
        if kind.saved_as is None
        and kind.opens(config.get("peft_type"))
        and all((config.get(key) or None) == (value or None) for key, value in kind.peft_options.items())
    ]
    return max(fitting, key=lambda kind: len(kind.peft_options), default=None)


def refusal(section: AdapterSection, quantization: Quantization[KindSection]) -> str | None:
    """Why a recipe's adapter cannot be trained on its base; None where it can."""
    method = adapters.bind(section)
    names = method.linear_names()
    beside = [quantization] if isinstance(names, str) or not names else [quantization.of(name) for name in names]
    kinds = dict.fromkeys(kind for each in beside for kind in each.single_kinds())
    return next((why for kind in kinds if (why := method.refuses(kind)) is not None), None)


def usual_rate(section: AdapterSection) -> float:
    """The learning rate that a recipe's adapter wants with its first values, as a multiple of LoRA's."""
    method = adapters.bind(section)
    begins = method.initialisation()
    return method.usual_rate * (begins.usual_rate if begins is not None else 1.0)


def begins_as_base(section: AdapterSection) -> bool:
    """Whether a model computes what its base does before the first step, to the last bit."""
    method = adapters.bind(section)
    start = method.initialisation()
    return section.init_from is None and method.starts_as_base and (start is None or start.starts_as_base)
