"""Which linears a recipe means: what all methods that stand beside linears share, and model and plan agree on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pydantic import field_validator

from lorafit.console.nearest import did_you_mean
from lorafit.errors import RecipeError
from lorafit.facts import LinearShape, ModelShape
from lorafit.kinds.adapters import AdapterSection

_ALL_LINEAR = frozenset({"all", "auto", "all-linear", "all-linears", "linear", "all-linear-layers", "*"})


def _means_all(name: str) -> bool:
    return re.sub(r"[\s_-]+", "-", name.strip().lower()) in _ALL_LINEAR


class LinearsSection(AdapterSection):
    """The section of a method that stands beside linears."""

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


def choose_linears(asked: Literal["all-linear"] | Sequence[str], shape: ModelShape) -> tuple[LinearShape, ...]:
    """The linears of a model that a recipe names. Raises RecipeError as `choose_names`."""
    able = tuple(linear for linear in shape.linears if not linear.left_out)
    left_out = {linear.name: linear.left_out for linear in shape.linears if linear.left_out}
    names = choose_names(asked, {linear.name for linear in able}, left_out)
    return tuple(linear for linear in able if linear.name in names)


def choose_names(
    asked: Literal["all-linear"] | Sequence[str], able: Iterable[str], left_out: Mapping[str, str]
) -> list[str]:
    """Last parts of the paths of the linears that a recipe names.

    Args:
        asked: `adapter.target_modules`.
        able: Names of the model's linears that may carry an adapter.
        left_out: Names of the others, each with the reason.

    Raises:
        RecipeError: A name matches no linear, or only such as cannot carry an adapter; the message lists the others.
            Or no linear can.
    """
    known = sorted(set(able))
    if not known:
        raise RecipeError("no linear of this model can carry an adapter", key="adapter.target_modules")
    if asked == "all-linear":
        return known
    for name in asked:
        if name not in known:
            hint = "" if name in left_out else did_you_mean(name, known)
            why = f"gets no adapter in this model: {left_out[name]}" if name in left_out else None
            raise RecipeError(
                f"'{name}' {why or 'matches no linear of this model'}",
                key="adapter.target_modules",
                todo=f"{hint}available: {', '.join(known)}",
            )
    return list(asked)
