"""Recipe x facts -> Plan: every derived number of a run, before it starts, and the table that shows them.

    Recipe ─┐
    ModelShape, DatasetFacts, DeviceFacts ─┴─> plan() ─> Plan (bounds) ─> rehearsal ─> ResolvedPlan (values, saved)
                                                 └─> require_fit(): exit 10 before any weight is loaded

`lorafit.estimation` is the same arithmetic for `lorafit estimate-memory`, which needs neither rows nor a card;
`count_flops` is the one place that knows what a run computes.
"""

from __future__ import annotations

from lorafit.plan.derive import Plan, memory_question, plan, require_fit
from lorafit.plan.flops import Flops, count_flops
from lorafit.plan.render import plan_table
from lorafit.plan.resolved import ResolvedPlan
from lorafit.plan.run_cost import check_price
from lorafit.plan.step_memory import MemoryQuestion

__all__ = [
    "Flops",
    "MemoryQuestion",
    "Plan",
    "ResolvedPlan",
    "check_price",
    "count_flops",
    "memory_question",
    "plan",
    "plan_table",
    "require_fit",
]
