"""Recipe x facts -> Plan: every derived number of a run, before it starts, and the table that shows them.

    Recipe ─┐
    ModelShape, DatasetFacts, DeviceFacts ─┴─> plan() ─> Plan (bounds) ─> rehearsal ─> ResolvedPlan (values, saved)
                                                 └─> require_fit(): exit 10 before any weight is loaded

`estimate_recipe` is the same arithmetic without rows and without a card, for `lorafit estimate-memory`.
"""

from __future__ import annotations

from lorafit.plan.derive import Plan, memory_question, plan, require_fit
from lorafit.plan.question import MemoryQuestion
from lorafit.plan.render import estimate_table, plan_table
from lorafit.plan.resolved import ResolvedPlan
from lorafit.plan.verdict import RecipeEstimate, Saving, estimate_recipe

__all__ = [
    "MemoryQuestion",
    "Plan",
    "RecipeEstimate",
    "ResolvedPlan",
    "Saving",
    "estimate_recipe",
    "estimate_table",
    "memory_question",
    "plan",
    "plan_table",
    "require_fit",
]
