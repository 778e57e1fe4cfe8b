"""`lorafit estimate-memory`: what a recipe needs on a card, by the closed form or by a dry run of train's own step."""

from __future__ import annotations

from lorafit.estimation.answer import Options, RowLengths
from lorafit.estimation.cards_compared import CardComparison
from lorafit.estimation.recipe_estimate import check_headroom, estimate_recipe
from lorafit.estimation.table import RecipeEstimate

__all__ = ["CardComparison", "Options", "RecipeEstimate", "RowLengths", "check_headroom", "estimate_recipe"]
