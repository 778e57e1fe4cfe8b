"""What a recipe asks of its methods beside numbers of the plan, in words: each kind with the options it was given."""

from __future__ import annotations

import json
from typing import Any

from lorafit.console.wording import counted
from lorafit.kinds.section import KindSection, Section
from lorafit.recipe.schema import Recipe


def describe_methods(recipe: Recipe) -> dict[str, str]:
    """Rows of the plan's table: the adapter, and what else decides what is trained when and at which rate."""
    training, plateau = recipe.training, recipe.evaluation.on_plateau
    found = {"adapter": describe_section(recipe.adapter)}
    if (unfreezing := training.unfreezing) is not None:
        first = f"the upper {counted(unfreezing.top, 'layer')} of those that are trained first"
        found["unfreezing"] = (
            f"{first}; the others join in equal parts at steps {', '.join(map(str, unfreezing.steps))}"
        )
    if training.embedding_noise is not None:
        found["embedding noise"] = f"NEFTune, alpha {training.embedding_noise:g}"
    if plateau is not None:
        falls = f"the rate falls to {plateau.factor:g} of what it is, {counted(plateau.at_most, 'time')} at most"
        back = ", and the run goes back to its best weights" if plateau.go_back else ""
        least = f" (by {plateau.min_delta:g})" if plateau.min_delta else ""
        found["on plateau"] = (
            f"after {counted(plateau.patience, 'evaluation')} without a better one{least} {falls}{back}"
        )
    return found


def describe_section(section: KindSection) -> str:
    """The kind, and every option that is not at its default: `lora, r 4, init pissa (iterations 8)`."""
    return ", ".join([section.kind, *_changed(section)])


def _changed(section: Section) -> list[str]:
    fields = type(section).model_fields.items()
    values = ((name, getattr(section, name), field.get_default(call_default_factory=True)) for name, field in fields)
    return [f"{name} {_in_words(value)}" for name, value, usual in values if not _is_usual(value, usual)]


def _is_usual(value: Any, usual: Any) -> bool:
    """Whether a value is its field's default, which may name a kind."""
    if isinstance(value, KindSection) and isinstance(usual, str):
        return value.kind == usual and not _changed(value)
    return bool(value == usual)


def _in_words(value: Any) -> str:
    if isinstance(value, Section):
        changed = f"({', '.join(_changed(value))})"
        return f"{value.kind} {changed}".removesuffix(" ()") if isinstance(value, KindSection) else changed
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_in_words(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_in_words, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
