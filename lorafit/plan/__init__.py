"""Recipe x facts -> Plan: every derived number of a run, before it starts, and the table that shows them.

    Recipe ─┐
    ModelShape, DatasetFacts, DeviceFacts ─┴─> plan() ─> Plan (bounds) ─> rehearsal ─> ResolvedPlan (values, saved)
                                                 └─> require_fit(): exit 10 before any weight is loaded

`lorafit.estimation` is the same arithmetic for `lorafit estimate-memory`, which needs neither rows nor a card;
`count_flops` is the one place that knows what a run computes.
"""

from __future__ import annotations

from lorafit.plan.bounds import MOST_MICRO_BATCH_TOKENS
from lorafit.plan.derive import Plan, plan, require_fit
from lorafit.plan.flops import Flops, count_flops
from lorafit.plan.render import plan_table, show_plan
from lorafit.plan.resolved import ResolvedPlan, Way
from lorafit.plan.run_cost import check_price

__all__ = [
    "MOST_MICRO_BATCH_TOKENS",
    "Flops",
    "Plan",
    "ResolvedPlan",
    "Way",
    "check_price",
    "count_flops",
    "plan",
    "plan_table",
    "require_fit",
    "show_plan",
]
