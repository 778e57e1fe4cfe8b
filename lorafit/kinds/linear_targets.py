"""Which linears a recipe means: what all methods that stand beside linears share, and model and plan agree on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lorafit.console.nearest import did_you_mean
from lorafit.errors import RecipeError
from lorafit.facts import LinearShape, ModelShape
from lorafit.kinds.adapters import AdapterSection
from lorafit.kinds.section import Section

_ALL_LINEAR = frozenset({"all", "auto", "all-linear", "all-linears", "linear", "all-linear-layers", "*"})


KEY_OF_NEW_TOKENS = "adapter.new_tokens"
_EMBEDDING_AND_HEAD = 2  # modules of one weight


def _means_all(name: str) -> bool:
    return re.sub(r"[\s_-]+", "-", name.strip().lower()) in _ALL_LINEAR


Numbers = list[Annotated[int, Field(ge=0)]]
"""Of layers, from 0."""


class LayersSection(Section):
    """Some layers of a model, numbered from 0 at its input; an encoder's come before those of its decoder."""

    first: int | None = Field(default=None, ge=1)
    """So many layers from the input."""
    last: int | None = Field(default=None, ge=1)
    """So many layers up to the output."""
    list: Numbers | None = Field(default=None, min_length=1)
    """Their numbers, e.g. [0, 5, 7]."""

    @model_validator(mode="after")
    def _is_one_choice(self) -> LayersSection:
        given = [key for key in ("first", "last", "list") if getattr(self, key) is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)} are given" if given else "none is given"
            raise ValueError(f"it needs one of first, last and list; {found}")
        twice = sorted({number for number in self.list or () if (self.list or []).count(number) > 1})
        if twice:
            raise ValueError(f"list names layer {twice[0]} twice")
        return self

    def numbers(self, count: int) -> frozenset[int]:
        """The layers that are meant, of a model that has `count`. Raises RecipeError where it has not so many."""
        asked = max(self.first or 0, self.last or 0, max(self.list or (0,)) + (self.list is not None))
        if asked > count:
            what = f"asks for {f'layer {asked - 1}' if self.list else f'{asked} layers'}; the model has {count}"
            todo = f"choose from 0 to {count - 1}" if self.list else f"ask for {count} at most"
            raise RecipeError(what, key="adapter.layers", todo=todo)
        if self.list is not None:
            return frozenset(self.list)
        return frozenset(range(self.first) if self.first is not None else range(count - (self.last or 0), count))


class LinearsSection(AdapterSection):
    """The section of a method that stands beside linears."""

    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the linears that get an adapter, e.g. [q_proj, v_proj]; all-linear: all but head and MoE routers."""
    layers: LayersSection | None = None
    """Which layers get an adapter: {first: 4}, {last: 4} or {list: [0, 5, 7]}; null: all, and what is in none."""

    modules_to_save: list[str] | None = Field(default=None, min_length=1)
    """Names of modules that are trained whole beside the adapter, in fp32, e.g. [embed_tokens, lm_head] or [norm]."""

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


def choose_linears(section: LinearsSection, shape: ModelShape) -> tuple[LinearShape, ...]:
    """The linears of a model that a recipe names; `count` and `layers` are of those in the layers that it chooses.

    Raises:
        RecipeError: As `choose_names`; or a chosen layer is not there, or none of them has a named linear.
    """
    able = tuple(linear for linear in shape.linears if not linear.left_out)
    left_out = {linear.name: linear.left_out for linear in shape.linears if linear.left_out}
    names = choose_names(section.target_modules, {linear.name for linear in able}, left_out)
    chosen = [linear for linear in able if linear.name in names]
    if section.layers is None:
        return tuple(chosen)
    numbers, found = section.layers.numbers(shape.layer_count), []
    for linear in chosen:
        own = tuple(number for number in shape.layers_of(linear) if number in numbers)
        found += [replace(linear, count=len(own), layers=own)] if own else []
    check_layers(section, names, {linear.name for linear in found})
    return tuple(found)


def check_layers(section: LinearsSection, names: Iterable[str], found: Iterable[str]) -> None:
    """Raises RecipeError where a linear that the recipe names stands in none of the layers that it chooses, or none of
    all does."""
    found = set(found)
    missing = [] if section.target_modules == "all-linear" and found else sorted(set(names) - found)
    if missing:
        what = f"'{missing[0]}' stands in none of these layers"
        raise RecipeError(what, key="adapter.layers", todo="choose others, or name other target_modules")


def whole_parameters(section: AdapterSection, shape: ModelShape) -> int:
    """Parameters of the modules that a recipe trains whole beside its adapter; an embedding that is the head counts
    once.

    Raises:
        RecipeError: A name is none of the model's modules, or of one whose weight others share too.
    """
    names = section.modules_to_save if isinstance(section, LinearsSection) else None
    known, counted, is_tied = {module.name: module for module in shape.modules}, 0, False
    for name in dict.fromkeys(names or ()):
        if name not in known:
            why = "is a linear of the layers, which an adapter is for" if _is_linear(name, shape) else None
            todo = f"{'' if why else did_you_mean(name, sorted(known))}available: {', '.join(sorted(known))}"
            what = f"'{name}' {why or 'is no module that can be trained whole'}"
            raise RecipeError(what, key="adapter.modules_to_save", todo=todo)
        if known[name].shares > _EMBEDDING_AND_HEAD:
            what = f"'{name}' has one weight with {known[name].shares - 1} other modules, a tie that PEFT does not keep"
            raise RecipeError(what, key="adapter.modules_to_save", todo="leave it out")
        shared = known[name].shares == _EMBEDDING_AND_HEAD
        counted += 0 if shared and is_tied else known[name].parameters
        is_tied = is_tied or shared
    return counted


def new_tokens(section: AdapterSection) -> dict[str, str]:
    """Tokens that a recipe teaches its base, each with the text that says what it means; empty where none does."""
    asked = getattr(section, "new_tokens", None) or {}
    return dict(asked) if isinstance(asked, Mapping) else dict.fromkeys(asked, "")


def check_new_tokens(section: AdapterSection, *, reads_pictures: bool) -> None:
    """Raises RecipeError where a recipe teaches tokens to a model that reads images, whose processor has a say too."""
    if new_tokens(section) and reads_pictures:
        what = "a model that reads images gets no new tokens: its processor would not know them"
        raise RecipeError(what, key=KEY_OF_NEW_TOKENS, todo="leave it out")


def row_parameters(section: AdapterSection, shape: ModelShape) -> int:
    """Parameters of the rows of new tokens: in the embedding, and in a head that is a matrix of its own.

    Raises:
        RecipeError: Other modules than the output head have the embedding's weight.
    """
    tokens = new_tokens(section)
    shared = max((module.shares for module in shape.modules), default=1)
    if tokens and shared > _EMBEDDING_AND_HEAD:
        what = f"{shared} modules of this model have the embedding's weight, a tie that PEFT does not keep"
        raise RecipeError(what, key=KEY_OF_NEW_TOKENS, todo="use another base model")
    matrices = 2 if shape.head_parameters else 1
    return len(tokens) * matrices * shape.embedding_width


def _is_linear(name: str, shape: ModelShape) -> bool:
    return any(linear.name == name for linear in shape.linears)


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
