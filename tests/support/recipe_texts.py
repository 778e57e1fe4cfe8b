"""Texts and checks that the recipe's tests share."""

from __future__ import annotations

from collections.abc import Callable

from lorafit.errors import LorafitError, Problems
from lorafit.recipe.load import LoadedRecipe

MINIMAL = "name: x\nmodel: {base: b}\ndata: {train: a.jsonl}\n"
Loads = Callable[..., LoadedRecipe]
Fails = Callable[..., LorafitError]


def parts(error: LorafitError) -> list[str]:
    """The lines of an error: those of `Problems`, or itself."""
    return [str(one) for one in error.errors] if isinstance(error, Problems) else [str(error)]
