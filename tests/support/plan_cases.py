"""Recipes, shapes and cards that the tests of the plan share."""

from __future__ import annotations

from typing import Any

from lorafit.facts import DatasetFacts, DeviceFacts, ModelShape
from lorafit.model.class_shape import find_shape
from lorafit.model.known_models import known_config
from lorafit.recipe.schema import Recipe

GIB = 2**30
ROWS = DatasetFacts(
    rows=100, tokens=20_000, trained_tokens=5_000, longest_tokens=600, longest_trained_tokens=200,
    longest_sequence_tokens=600,
    squared_tokens=6_000_000, validation_rows=10, validation_longest_tokens=500,
)  # fmt: skip


def card(gib: float, *, bf16: bool = True, kind: str = "cuda", count: int = 1) -> DeviceFacts:
    return DeviceFacts(kind, f"a {gib} GiB card", round(gib * GIB), bf16, count)


def shape_of(hub_id: str = "meta-llama/Llama-3.1-8B") -> ModelShape:
    config = known_config(hub_id)
    assert config is not None
    return find_shape(config)


def recipe(**sections: Any) -> Recipe:
    values: dict[str, Any] = {"name": "x", "model": {"base": "b"}, "data": {"train": "a.jsonl"}}
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return Recipe.model_validate(values)
