"""How large micro-batches are, and on a CPU how many of them run at once: what gives the most tokens a second."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lorafit.trainer.stage import Stage

CLOSE_ENOUGH = {"cpu": 0.95, "gpu": 0.97}  # of the best rate: the smaller budget is taken
_FIRST_BUDGET_TOKENS = 640  # below this, what every micro-batch costs outweighs its products
_MOST_CORE_TOKENS = 640  # on a CPU: beyond, products gain little and the other operations leave the caches


def fastest_number(stage: Stage, least: int, most: int, checkpointing: bool) -> tuple[int, dict[int, float]]:
    """A micro-batch a core, as many as the step has and memory holds; or one at a time on all cores.

    Args:
        stage: The run's.
        least: Padded tokens that one micro-batch has at least.
        most: Those of a whole step.
        checkpointing: Whether it is on.

    Returns:
        How many, and what is known of it: tokens a second by budget.
    """
    at_once = min(torch.get_num_threads(), most // least)
    if at_once > 1 and not stage.may_run_at_once(checkpointing):
        at_once = 1
    budget = max(least, min(most // max(at_once, 1), _FIRST_BUDGET_TOKENS))
    while at_once > 1 and not stage.fits(budget * at_once, checkpointing, stage.attention):
        at_once -= 1
    if at_once <= 1:
        return 1, {}
    tried = {number: stage.rate_if_it_fits(budget, number) for number in (1, at_once)}
    rates = {number: rate for number, rate in tried.items() if rate is not None}
    stage.measured["at_once_tokens_per_second"] = {str(number): round(rate, 1) for number, rate in rates.items()}
    fastest = max(rates, key=lambda number: rates[number], default=1)
    return fastest, {budget: rates[fastest]} if rates else {}


def fastest_budget(
    stage: Stage, least: int, most: int, checkpointing: bool, until: float, at_once: int, known: dict[int, float]
) -> int:
    """Doubles the budget while that pays; the smallest that is close enough to the fastest.

    It begins at a size that is never far from the best, so that a machine too slow to try more is not left with
    the smallest.

    Args:
        stage: The run's.
        least: The smallest budget.
        most: The largest.
        checkpointing: Whether it is on.
        until: No further candidate is begun after this reading of `time.perf_counter`.
        at_once: Micro-batches at a time.
        known: Tokens a second of budgets that were measured before.
    """
    rates: dict[int, float] = {}
    close_enough = CLOSE_ENOUGH["cpu" if stage.device.type == "cpu" else "gpu"]
    if stage.device.type == "cpu":
        cores = torch.get_num_threads() if at_once == 1 else 1  # a micro-batch
        most = min(most // at_once, max(least, _MOST_CORE_TOKENS * cores))
    budget = max(least, min(most, _FIRST_BUDGET_TOKENS))
    while budget > least and not stage.fits(budget * at_once, checkpointing, stage.attention):
        budget = max(least, budget // 2)
    first = budget
    while budget <= most and stage.fits(budget * at_once, checkpointing, stage.attention):
        best = max(rates.values(), default=0.0)
        rate = known.get(budget) or stage.rate_if_it_fits(budget, at_once)
        if rate is None:
            break
        rates[budget] = rate
        if rates[budget] * close_enough < best or budget == most or time.perf_counter() > until:
            break
        budget = min(2 * budget, most)
    stage.measured["budget_tokens_per_second"] = {str(b): round(rate, 1) for b, rate in rates.items()}
    return next((b for b, rate in rates.items() if rate >= close_enough * max(rates.values())), first)
