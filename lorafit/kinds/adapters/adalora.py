"""AdaLoRA: the update of a frozen weight is P E Q, E diagonal, and what the loss feels least of all E is cut.

    W' = W + s P diag(E) Q      P [out, r], Q [r, in], E [r];  s = alpha / (r + 1e-5), r what each linear began with

    triplet (P_i, E_i, Q_i) of any linear ─> importance: s(w) averaged over its entries, s = I-bar * U-bar,
                                             I = |w dL/dw| (section 3.2)
    step       1 .. warmup         .. total - final          .. total
    budget     all of them         falls by a cube (3.3)     r a linear on average; the choice is made

PEFT keeps averages and masks (RankAllocator); the loop calls it between steps, and adds the penalty that keeps P and Q
near orthogonal (equation 4) to the gradient of a step, where no loss tells of it.

Source: Zhang et al. 2023, AdaLoRA (https://arxiv.org/abs/2303.10512), sections 3.1 to 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from lorafit.contracts import JsonMapping, JsonObject, JsonValue
from lorafit.kinds.adapter_parts import Number, Outcome, Rank, SavedField, Site
from lorafit.kinds.adapters import Adapter, adapters
from lorafit.kinds.adapters._low_rank import LowRankFolding
from lorafit.kinds.folding import AdaptedLayer
from lorafit.kinds.linear_targets import LinearsSection, choose_linears
from lorafit.ops.step_hook import StepHook

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel

    from lorafit.facts import LinearShape, ModelShape, RunFacts

_FRACTION = Annotated[float, Field(gt=0, lt=1)]
_STEPS = Annotated[int, Field(ge=0)]
_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")
_OWN_KEYS = frozenset(
    {
        *("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
        "rank_pattern",
    }
)
_RANK_OFFSET = 1e-5  # PEFT's, in the denominator of the scale


class AdaloraSection(LinearsSection):
    """Updates P E Q beside frozen linears, whose ranks follow from what the loss feels of them."""

    kind: Literal["adalora"] = "adalora"
    """AdaLoRA; E begins at zero and wants a larger learning rate than LoRA, e.g. 1e-3."""
    r: int = Field(default=8, ge=1, le=4096)
    """Rank of a linear on average, at the end."""
    init_r: int | None = Field(default=None, ge=2, le=4096)
    """Rank of each linear at the start, more than r; null: one and a half times r, as in the paper."""
    alpha: float = Field(default=32.0, gt=0.0, le=1e6, allow_inf_nan=False)
    """The update is scaled by alpha / init_r."""
    dropout: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the adapter's inputs that is zeroed while training (0 to 1)."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps before the first rank is taken away; null: a tenth of the run."""
    final_steps: int | None = Field(default=None, ge=0)
    """Steps at the end, with the ranks as they were chosen; null: half of the run."""
    interval_steps: int | None = Field(default=None, ge=1)
    """Every so many steps ranks are given anew; null: about a hundred times in the run."""
    beta1: float = Field(default=0.85, gt=0.0, lt=1.0)
    """Share of the last average in the next one of a weight's importance."""
    beta2: float = Field(default=0.85, gt=0.0, lt=1.0)
    """The same for how much that varies."""
    orthogonality: float = Field(default=0.5, ge=0.0, le=1e3, allow_inf_nan=False)
    """Weight of the penalty that keeps P and Q near orthogonal; 0: none."""

    @model_validator(mode="after")
    def _has_ranks_to_take_away(self) -> AdaloraSection:
        if self.first_rank <= self.r:
            usual = math.ceil(1.5 * self.r)
            raise ValueError(f"init_r {self.init_r} must be more than r {self.r}: ranks are taken away; try {usual}")
        return self

    @property
    def first_rank(self) -> int:
        """Rank of each linear at the start."""
        return math.ceil(1.5 * self.r) if self.init_r is None else self.init_r


class AdaloraFolding(LowRankFolding):
    """Changes by s P diag(E) Q."""

    parts: ClassVar[Mapping[str, str]] = {"lora_A": "A", "lora_B": "B", "lora_E": "E"}
    new_weight: ClassVar[str] = "W + s P diag(E) Q"

    def factors(
        self, layer: AdaptedLayer, matrix: int, first_row: int, stop_row: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """LoRA's of P and diag(E) Q, in fp32."""
        left, right = super().factors(layer, matrix, first_row, stop_row)
        values = self.read(layer.tensors["E"])
        return (left * values.T, right) if layer.transposed else (left, values * right)

    def scaling(self, layer: AdaptedLayer) -> float:
        """s: alpha over the rank that each linear began with."""
        return float(self._config["lora_alpha"] / (self._config["init_r"] + _RANK_OFFSET))


class Budget(StepHook):
    """Gives each linear its ranks between steps, by PEFT's RankAllocator.

    Args:
        model: With its fresh adapter; its PEFT config is told the steps.
        section: The recipe's.
        total_steps: Of the run.
    """

    def __init__(self, model: PeftModel, section: AdaloraSection, total_steps: int) -> None:
        tuner: Any = model.base_model
        self._tuner, self._weight = tuner, section.orthogonality
        self._config = tuner.peft_config[tuner.trainable_adapter_name]
        steps = steps_of(section, total_steps)
        self._config.tinit, self._config.tfinal, self._config.deltaT = steps
        self._config.total_step = total_steps
        self._parameters = {
            path: p for path, p in tuner.model.named_parameters() if ".lora_" in path and p.requires_grad
        }
        self._ranks: dict[str, list[bool]] | None = None
        self.state_bytes = 3 * sum(parameter.nbytes for parameter in self._parameters.values())

    def penalty(self) -> torch.Tensor | None:
        """||P^T P - I|| and ||Q Q^T - I|| (Frobenius): their mean, as the authors' code and PEFT take it."""
        import torch

        if not self._weight:
            return None
        parts = self._parameters.items()
        square = [p.T @ p if ".lora_B." in path else p @ p.T for path, p in parts if ".lora_E." not in path]
        norms = [torch.linalg.matrix_norm(s - torch.eye(len(s), dtype=s.dtype, device=s.device)) for s in square]
        return self._weight * torch.stack(norms).mean()

    def after_optimizer_step(self, step: int) -> None:
        """Averages importance, masks E where it is time.

        PEFT leaves the choice in its config, and would save parts of the matrices by it: a resume needs them all.
        """
        import torch

        for parameter in self._parameters.values():  # PEFT wants them all
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        if step and not math.isfinite(float(torch.nn.utils.get_total_norm(gradients))):
            for gradient in gradients:  # fp16 overflowed: such a step says nothing of importance
                gradient.zero_()
        self._config.rank_pattern = self._ranks
        self._tuner.update_and_allocate(step)
        self._ranks, self._config.rank_pattern = self._config.rank_pattern, None

    def state_dict(self) -> Mapping[str, JsonValue | torch.Tensor]:
        """The averages of each matrix, and the choice as it stands."""
        allocator = self._tuner.rankallocator
        averages = {f"{key}/{path}": value for key in _AVERAGES for path, value in getattr(allocator, key).items()}
        return {"ranks": self._ranks, **averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes them back."""
        self._ranks, allocator = state["ranks"], self._tuner.rankallocator
        for name, value in state.items():
            key, _, path = name.partition("/")
            if key in _AVERAGES:
                getattr(allocator, key)[path] = value.to(self._parameters[path].device)
        allocator.ipt = dict(allocator.exp_avg_ipt)  # of a single step; what is there has averages


def steps_of(section: AdaloraSection, total_steps: int) -> tuple[int, int, int]:
    """First and last steps without a change of the budget, and the interval of those between."""
    final = min(total_steps // 2, max(0, total_steps - 2)) if section.final_steps is None else section.final_steps
    warmup = total_steps // 10 if section.warmup_steps is None else section.warmup_steps
    return warmup, final, section.interval_steps or max(1, total_steps // 100)


@adapters.register(AdaloraSection)
class Adalora(Adapter[AdaloraSection]):
    """PEFT's AdaLoRA in fp32. Checkpoints hold every triplet; the run's adapter those that are left."""

    starts_as_base: ClassVar[bool] = True
    peft_type: ClassVar[str] = "ADALORA"
    usual_rate: ClassVar[float] = 5.0
    saved_fields: ClassVar[Mapping[str, SavedField]] = {
        "init_r": SavedField(Rank, "a whole number from 1", needed=True),
        "lora_alpha": SavedField(Number, "a finite number", needed=True),
        "total_step": SavedField(Rank, "a whole number from 1", needed=True),
        "target_r": SavedField(Rank, "a whole number from 1"),
        "rank_pattern": SavedField(dict[str, list[bool]] | None, "which of its ranks each linear keeps"),
        **{key: SavedField(_STEPS, "a whole number from 0") for key in ("tinit", "tfinal", "deltaT")},
        **{key: SavedField(_FRACTION, "a number between 0 and 1") for key in ("beta1", "beta2")},
        "orth_reg_weight": SavedField(Annotated[float, Field(ge=0)], "a number from 0"),
        "lora_dropout": SavedField(Annotated[float, Field(ge=0, le=1)], "a number from 0 to 1"),
        "fan_in_fan_out": SavedField(bool, "true or false"),
    }
    recipe_fields: ClassVar[Mapping[str, str]] = {"init_r": "init_r", "lora_alpha": "alpha"}
    form_fields: ClassVar[Sequence[str]] = ("rank_pattern", "modules_to_save", "bias")

    def sites(self, shape: ModelShape) -> tuple[Site, ...]:
        """The linears that get an adapter: P, Q and E of the rank at the start."""
        return tuple(
            Site("linear", linear.name, linear.count, self._parameters_of(linear) * linear.count, linear)
            for linear in choose_linears(self.section, shape)
        )

    def _parameters_of(self, linear: LinearShape) -> int:
        return self.section.first_rank * (linear.in_features + linear.out_features + 1)

    def peft_config(self, target_modules: Sequence[str], *, is_transposed: bool) -> PeftConfig:
        """PEFT's AdaLoraConfig; the hook tells it the run's steps. The penalty is the hook's: PEFT would add it to a
        loss."""
        from peft import AdaLoraConfig

        section, alpha = self.section, self.section.alpha
        return AdaLoraConfig(
            init_r=section.first_rank,
            target_r=section.r,
            lora_alpha=int(alpha) if alpha.is_integer() else alpha,
            lora_dropout=section.dropout,
            beta1=section.beta1,
            beta2=section.beta2,
            orth_reg_weight=0.0,
            total_step=1,
            target_modules=list(target_modules),
            fan_in_fan_out=is_transposed,
        )

    def settle(self, model: PeftModel) -> None:
        """The number in the denominator of the scale is none to be trained; beside a base in bf16 PEFT makes it one."""
        for path, parameter in model.named_parameters():
            if ".ranknum." in path:
                parameter.requires_grad_(False)

    def step_hook(self, model: PeftModel, run: RunFacts) -> StepHook:
        """Importance, budget and penalty."""
        return Budget(model, self.section, run.total_steps)

    def refuses_steps(self, total_steps: int) -> str | None:
        """Where no step is left in which the budget falls."""
        warmup, final, _ = steps_of(self.section, total_steps)
        if total_steps - final > max(1, warmup):
            return None
        return (
            f"leaves no steps in which ranks are taken away: {total_steps} of the run, {warmup} of warmup_steps and "
            f"{final} of final_steps"
        )

    def outcome(self, config: JsonMapping, step: int, total_steps: int) -> Outcome | None:
        """Ranks that are left, by the linears' names; and whether the budget was reached by then."""
        left: dict[str, list[int]] = {}
        for path, kept in (config.get("rank_pattern") or {}).items():
            left.setdefault(path.removesuffix(".lora_E").rpartition(".")[2], []).append(sum(kept))
        if not left:
            return None
        linears, total = sum(map(len, left.values())), sum(map(sum, left.values()))
        budget, reached = self.section.r * linears, total_steps - steps_of(self.section, total_steps)[1]
        by_name = {name: {"min": min(of), "mean": sum(of) / len(of), "max": max(of)} for name, of in left.items()}
        listed = ", ".join(f"{name} {of['min']} to {of['max']} ({of['mean']:.1f})" for name, of in by_name.items())
        told = f"ranks left, least to most over layers (mean): {listed}; {total:,} in all, of a budget of {budget:,}"
        figures: JsonObject = {"ranks": by_name, "total": total, "budget": budget, "budget_reached_at_step": reached}
        early = (
            f"the adapter is that of step {step:,}, before the budget is reached at step {reached:,}; to choose among "
            "later steps alone, lower adapter.warmup_steps and raise adapter.final_steps"
        )
        return Outcome(told, figures, early if step < reached else "")

    def refuses_unfreezing(self) -> str | None:
        """A layer without gradients would seem to be of no importance."""
        return "takes ranks from what the loss does not feel, and it feels nothing of a layer that is frozen"

    @classmethod
    def opened_config(cls, config: JsonMapping) -> JsonObject:
        """The saved one, without what decides first values, and without the penalty that PEFT adds to every loss."""
        return {**config, "init_lora_weights": True, "orth_reg_weight": 0.0}

    @classmethod
    def reopen(cls, model: PeftModel, name: str, tensors: Collection[str]) -> None:
        """Gives each linear the ranks that are left of it; its scale stays."""
        config: Any = model.peft_config[name]
        tuner: Any = model.base_model
        tuner.trainable_adapter_name = name  # of one that is not trained PEFT sets none, and asks for it in any loss
        for path, kept in (config.rank_pattern or {}).items():
            layer: Any = model.base_model.model.get_submodule(path.removesuffix(".lora_E"))
            layer.update_layer(name, sum(kept), config.lora_alpha, config=config)
            layer.ranknum[name].data.fill_(float(config.init_r))

    @classmethod
    def live_tensors(cls, model: PeftModel, name: str) -> dict[str, torch.Tensor]:
        """All of every matrix, whatever PEFT would cut off of them where it saves."""
        config: Any = model.peft_config[name]
        pattern, config.rank_pattern = config.rank_pattern, None
        try:
            return super().live_tensors(model, name)
        finally:
            config.rank_pattern = pattern

    @classmethod
    def finished(
        cls, config: JsonMapping, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[JsonObject, dict[str, torch.Tensor]]:
        """Without the triplets whose E is zero; PEFT's `rank_pattern` says which. No value changes."""
        left, pattern = dict(tensors), {}
        for path in [path for path in tensors if path.endswith(".lora_E")]:
            kept = tensors[path].flatten() != 0
            pattern[path.removeprefix("base_model.model.")] = kept.tolist()
            a, b = (path.removesuffix("E") + part for part in "AB")
            left |= {path: tensors[path][kept], a: tensors[a][kept], b: tensors[b][:, kept].contiguous()}
        return {**config, "rank_pattern": pattern}, left

    @classmethod
    def folding(cls, config: JsonMapping) -> AdaloraFolding:
        """P, E and Q, with or without what was cut."""
        return AdaloraFolding(config, _OWN_KEYS)
