"""Before step 1: the run's real shapes, tried out, and everything as it was afterwards.

    what is open?   attention            each candidate on one typical micro-batch; the fastest is kept that gives the
                                         logits of eager attention and, when packing, keeps documents apart; eager,
                                         which keeps all scores, only where it is more than 10 % faster
                    micro_batch_tokens   doubled from one longest row while it pays; smallest within 3 % of the best
                                         (5 % on a CPU), on a CPU at most 640 tokens a core
                    at once              on a CPU a micro-batch a core, where that is faster than one on all cores
                    checkpointing        off, unless memory says otherwise
    always          the heaviest training micro-batches forward and backward, the heaviest evaluation micro-batch
                    forward

No optimizer step is taken, gradients are cleared, random numbers and modes are put back.

The heaviest micro-batches that a run can meet under a token budget are made of its own rows:

    widest    as many of the longest rows as the budget takes: most attention a token
    fullest   the width that leaves the least of the budget unused: most tokens

Packed rows are filled to the last token, and hold two documents at least, so that whatever keeps them apart is there.

So `auto` becomes values, once: from the recipe, the resumed run, a given plan, the cache, or the rehearsal.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from lorafit.contracts import Example, Examples, Reporter
from lorafit.errors import CheckpointError
from lorafit.files.cache import cache_folder, keep, kept, refuse_foreign
from lorafit.objective import TrainedTask
from lorafit.ops.process_memory import is_out_of_memory, peak_memory_bytes
from lorafit.plan import Plan, ResolvedPlan
from lorafit.trainer.executor import out_of_memory, time_micro_batches
from lorafit.trainer.stage import Stage, fastest_attention, fastest_budget, fastest_number
from lorafit.trainer.threaded_micro_batches import run_at_once

_MOST_SECONDS = 15.0  # no further candidate is begun after this


def heaviest_shapes(
    lengths: Sequence[int], token_budget: int, most_rows: int, *, one_row: bool
) -> list[tuple[int, int]]:
    """(rows, tokens of each) of the heaviest micro-batches.

    Args:
        lengths: Tokens of each row of the set.
        token_budget: Padded tokens of a micro-batch.
        most_rows: Rows of a step; a micro-batch never holds more.
        one_row: Whether packed documents fill one row as long as the budget.
    """
    widths, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    longest = int(widths[-1])
    if one_row:
        return [(1, max(token_budget, longest))]
    rows = np.minimum(np.minimum(token_budget // widths, np.cumsum(counts)), most_rows)
    rows[-1] = max(1, rows[-1])
    tokens = rows * widths
    fullest = int(np.flatnonzero(tokens == tokens.max())[-1])
    return [(int(rows[place]), int(widths[place])) for place in dict.fromkeys((len(widths) - 1, fullest))]


def fill_rows(task: TrainedTask, examples: Examples, rows: int, width: int, *, packing: bool) -> list[list[Example]]:
    """Documents of so many rows of `width` tokens: the longest rows of the set, cut to fit (the end of them is kept).

    Fewer, or shorter ones, where the set is too small.
    """
    longest_first = np.argsort(-np.asarray(examples.lengths), kind="stable").tolist()
    if not packing:
        return [[task.cut(examples[row], width)] for row in longest_first[:rows]]
    left = iter(longest_first)
    filled = (list(_fill(task, examples, left, width)) for _ in range(rows))
    return [documents for documents in filled if documents]


def _fill(task: TrainedTask, examples: Examples, rows: Iterator[int], width: int) -> Iterator[Example]:
    left = width
    while left and (row := next(rows, None)) is not None:
        tokens = min(left, -(-width // 2), int(examples.lengths[row]))
        left -= tokens
        yield task.cut(examples[row], tokens)


def rehearse(stage: Stage, plan: Plan) -> ResolvedPlan:
    """Settles what the plan leaves open, then tries the heaviest micro-batches.

    Raises:
        NumericsError: Packing is asked for, and documents in a row see each other.
        ResourceError: Not even the smallest candidate fits into memory.
    """
    began, attention = time.perf_counter(), plan.attention
    least_tokens, most_tokens = plan.min_micro_batch_tokens, plan.max_micro_batch_tokens
    micro_batch_tokens, gradient_checkpointing = plan.micro_batch_tokens, plan.gradient_checkpointing
    with stage.rolled_back():
        budget = least_tokens if micro_batch_tokens is None else micro_batch_tokens
        checkpointing = gradient_checkpointing is True or (
            gradient_checkpointing is None
            and not stage.fits(budget, False, stage.attention if attention == "auto" else attention)
        )
        stage.set_checkpointing(checkpointing)
        if attention == "auto" or micro_batch_tokens is None:
            # The first forward and backward pays for lazy set-up, which no candidate should.
            time_micro_batches(stage.executor, [stage.shortest_batch()])
        if attention == "auto":
            attention = fastest_attention(stage, budget, checkpointing)
            stage.reporter.info(f"rehearsal: {attention} attention is taken")
        stage.set_attention(attention)
        at_once = 1
        if micro_batch_tokens is None:
            until = began + _MOST_SECONDS
            at_once, rates = fastest_number(stage, least_tokens, most_tokens, checkpointing)
            budget = fastest_budget(stage, least_tokens, most_tokens, checkpointing, until, at_once, rates)
        dtypes, where = (plan.dtype, plan.compute_dtype), (stage.device.type, stage.executor.ranks)
        choice = ResolvedPlan(
            budget, 0, attention, checkpointing, *dtypes, *where, "rehearsal", stage.measured, at_once
        )
        choice = _heaviest_that_fits(
            stage,
            _with_evaluation_budget(stage, choice),
            may_checkpoint=gradient_checkpointing is None,
            may_shrink_to=least_tokens if micro_batch_tokens is None else budget,
        )
    stage.measured["seconds"] = round(time.perf_counter() - began, 3)
    return choice


def _heaviest_that_fits(
    stage: Stage, choice: ResolvedPlan, *, may_checkpoint: bool, may_shrink_to: int
) -> ResolvedPlan:
    """Halves the budget, then turns checkpointing on, until the heaviest micro-batches run."""
    while True:
        stage.clear()  # what the candidates left would stand beside the heaviest
        try:
            run_heaviest(stage, choice)
            return choice
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            problem = out_of_memory("before step 1", max(stage.examples.lengths), choice.micro_batch_tokens)
        # Outside of the except block, whose traceback holds the activations.
        budget = choice.micro_batch_tokens
        if choice.micro_batches_at_once > 1:
            choice = replace(choice, micro_batches_at_once=1)
        elif budget > may_shrink_to:
            smaller = replace(choice, micro_batch_tokens=max(may_shrink_to, budget // 2))
            choice = _with_evaluation_budget(stage, smaller)
        elif may_checkpoint and not choice.gradient_checkpointing:
            choice = replace(choice, gradient_checkpointing=True)
            stage.set_checkpointing(True)
        else:
            raise problem


def _with_evaluation_budget(stage: Stage, choice: ResolvedPlan) -> ResolvedPlan:
    """An evaluation takes as large micro-batches as training, and its longest row at least."""
    longest = max(stage.validation.lengths, default=1) if stage.validation is not None else 1
    return replace(choice, evaluation_micro_batch_tokens=max(choice.micro_batch_tokens, int(longest)))


def run_heaviest(stage: Stage, choice: ResolvedPlan) -> None:
    """The heaviest micro-batches of training and of evaluation, with the optimizer's state in memory."""
    task = stage.objective.task
    ballast = torch.empty(
        stage.optimizer_bytes if stage.device.type == "cuda" else 0, dtype=torch.uint8, device=stage.device
    )
    for rows, width in heaviest_shapes(
        stage.examples.lengths, choice.micro_batch_tokens, stage.step_rows.batch_size, one_row=stage.cutter.one_row
    ):
        filled = fill_rows(task, stage.examples, rows, width, packing=stage.packing)
        batches = [task.collate(filled, stage.pad_id)] * choice.micro_batches_at_once
        with run_at_once(stage.executor, choice.micro_batches_at_once) as executor:
            time_micro_batches(executor, batches)
    if stage.validation is not None and len(stage.validation):
        count = len(stage.validation)
        for rows, width in heaviest_shapes(
            stage.validation.lengths, choice.evaluation_micro_batch_tokens, count, one_row=False
        ):
            batch = task.collate(fill_rows(task, stage.validation, rows, width, packing=False), stage.pad_id)
            stage.objective.eval()
            stage.objective.score(batch.to(stage.device))
            stage.objective.train()
    del ballast
    stage.measured["peak_memory_bytes"] = peak_memory_bytes(stage.device)


def resolve_plan(
    plan: Plan,
    stage: Stage,
    *,
    resumed: ResolvedPlan | None = None,
    given: ResolvedPlan | None = None,
    cache_name: str | None = None,
) -> ResolvedPlan:
    """Settles every open value of the plan and makes the model run so.

    What the recipe fixes stays; all that it leaves open comes from one source. The heaviest micro-batches are tried
    unless this very run, or one with the same recipe, data, device and versions, has tried them before.

    Args:
        plan: What the recipe fixes, and bounds.
        stage: What candidates are tried on.
        resumed: The values that the resumed run was trained with.
        given: Those of another run (`--plan`).
        cache_name: What the cache keeps the values for (recipe, data, device, code) under; read, and written after a
            rehearsal.

    Raises:
        ResourceError: The heaviest micro-batch does not fit into memory.
    """
    cached = _read_cached(cache_name, stage.reporter)
    is_open = plan.attention == "auto" or None in (plan.gradient_checkpointing, plan.micro_batch_tokens)
    known = next(((s, v) for s, v in (("run", resumed), ("plan", given), ("cache", cached)) if v is not None), None)
    if known is not None:
        source, values = known
        choice = _taken(plan, values, stage)
        stage.apply(choice)
        if source == "plan":
            with stage.rolled_back():
                run_heaviest(stage, choice)
    else:
        source = "rehearsal" if is_open else "recipe"
        if is_open:
            what = "rehearsal: measuring attention and micro-batches on this run's rows"
            stage.reporter.info(f"{what}, kept for this recipe with this seed; --plan takes another run's")
        choice = rehearse(stage, plan)
    resolved = replace(
        choice,
        dtype=plan.dtype,
        compute_dtype=plan.compute_dtype,
        device_kind=stage.device.type,
        ranks=stage.executor.ranks,
        source=source if is_open else "recipe",
    )
    if stage.executor.ranks > 1:  # each measured for itself, and clocks differ: rank 0's values
        resolved = ResolvedPlan.from_json(stage.executor.gather(resolved.to_json())[0])
        stage.apply(_taken(plan, resolved, stage))
    if cache_name is not None and cached is None and source == "rehearsal" and stage.executor.rank == 0:
        keep(cache_name, resolved.to_json())
    return resolved


def _taken(plan: Plan, values: ResolvedPlan, stage: Stage) -> ResolvedPlan:
    """What the recipe fixes, and for the rest `values`."""
    tokens, checkpointing = plan.micro_batch_tokens, plan.gradient_checkpointing
    choice = replace(
        values,
        micro_batch_tokens=values.micro_batch_tokens if tokens is None else tokens,
        attention=values.attention if plan.attention == "auto" else plan.attention,
        gradient_checkpointing=values.gradient_checkpointing if checkpointing is None else checkpointing,
        micro_batches_at_once=values.micro_batches_at_once if tokens is None else 1,
    )
    if choice.micro_batches_at_once > 1 and not stage.may_run_at_once(choice.gradient_checkpointing):
        return replace(choice, micro_batches_at_once=1)
    return choice


def _read_cached(name: str | None, reporter: Reporter) -> ResolvedPlan | None:
    """What the cache holds; anything unreadable is measured anew.

    Raises:
        SafetyError: Others may have put it there.
    """
    if name is None:
        return None
    refuse_foreign((cache_folder() / name).parent)
    stored = kept(name)
    try:
        return None if stored is None else ResolvedPlan.from_json(stored, name)
    except CheckpointError as error:
        reporter.info(f"ignored a cached plan that cannot be read ({error})")
        return None
