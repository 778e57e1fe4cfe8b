"""LoRA: a frozen weight W becomes W + (alpha / r) * B A, and only A [r, in] and B [out, r] are trained.

Source: Hu et al. 2021, LoRA (https://arxiv.org/abs/2106.09685), section 4.1.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from lorafit.console.nearest import nearest
from lorafit.errors import RecipeError
from lorafit.kinds.adapters import Adapter, AdapterSection, adapters

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lorafit.facts import LinearShape, ModelShape


_ALL_LINEAR = frozenset({"all", "auto", "all-linear", "all-linears", "linear", "all-linear-layers", "*"})


def _means_all(name: str) -> bool:
    return re.sub(r"[\s_-]+", "-", name.strip().lower()) in _ALL_LINEAR


class LoraSection(AdapterSection):
    """Low-rank adapters beside frozen linears."""

    kind: Literal["lora"] = "lora"
    """LoRA."""
    r: int = Field(default=16, ge=1, le=4096)
    """Rank: width of the bottleneck."""
    alpha: float = Field(default=32.0, gt=0.0, le=1e6, allow_inf_nan=False)
    """The update is scaled by alpha / r."""
    dropout: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the adapter's inputs that is zeroed while training (0 to 1)."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the linears that get an adapter, e.g. [q_proj, v_proj]; all-linear: all but head and MoE routers."""

    @field_validator("target_modules")
    @classmethod
    def _targets_name_something(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("no trainable parameters: the list is empty; name linears or write all-linear")
        whole = [name for name in value if _means_all(name)] if isinstance(value, list) else []
        if whole:
            others = f", without {', '.join(x for x in value if x not in whole)[:60]} beside it" if value[1:] else ""
            raise ValueError(f"{whole[0]!r} is no linear's name; did you mean all-linear? It stands alone{others}")
        wrong = [name for name in value if not name.strip() or "." in name] if isinstance(value, list) else []
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no linear's name; give the last part of its path, e.g. q_proj")
        return value


@adapters.register(LoraSection)
class Lora(Adapter[LoraSection]):
    """PEFT's LoRA with fp32 adapter weights, B = 0 at the start."""

    closed_form: ClassVar[bool] = True

    def targets(self, shape: ModelShape) -> tuple[LinearShape, ...]:
        """The linears that get an adapter.

        Raises:
            RecipeError: A name matches no linear of the model, or only such as take no adapter; the message lists the
                others.
        """
        able = tuple(linear for linear in shape.linears if not linear.left_out)
        if self.section.target_modules == "all-linear":
            return able
        known = list(dict.fromkeys(linear.name for linear in able))
        for name in self.section.target_modules:
            if name not in known:
                reasons = {linear.name: linear.left_out for linear in shape.linears}
                close = nearest(name, known, count=1)
                hint = f"did you mean {close[0]}? " if close and name not in reasons else ""
                why = f"gets no adapter: {reasons[name]}" if name in reasons else "matches no linear of this model"
                raise RecipeError(
                    f"'{name}' {why} ({shape.model_type})",
                    key="adapter.target_modules",
                    todo=f"{hint}available: {', '.join(known)}",
                )
        return tuple(linear for linear in able if linear.name in self.section.target_modules)

    def trainable_parameters(self, linear: LinearShape) -> int:
        """A [r, in] and B [out, r] of all `linear.count` layers."""
        return self.section.r * (linear.in_features + linear.out_features) * linear.count

    def rank(self) -> int:
        """r."""
        return self.section.r

    def build(self, model: torch.nn.Module, target_modules: Sequence[str], seed: int) -> torch.nn.Module:
        """The PEFT model with a fresh adapter: A from Kaiming-uniform under `seed`, B zero, both fp32."""
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        modules = dict(model.named_modules())
        wanted = [m for name, m in modules.items() if any(name == t or name.endswith(f".{t}") for t in target_modules)]
        config = LoraConfig(
            r=self.section.r,
            lora_alpha=int(self.section.alpha) if self.section.alpha.is_integer() else self.section.alpha,
            lora_dropout=self.section.dropout,
            target_modules=list(target_modules),
            fan_in_fan_out=bool(wanted) and all(isinstance(m, Conv1D) for m in wanted),
            bias="none",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            adapted: torch.nn.Module = get_peft_model(model, config, autocast_adapter_dtype=True)
        return adapted
