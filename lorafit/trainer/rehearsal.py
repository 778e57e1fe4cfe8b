"""Before step 1: what the run may be run with is told and proven, its heaviest micro-batches are run, and everything is
as it was afterwards.

    what is open?   attention            what gives the logits of eager attention and, when packing, keeps documents
                                         apart; eager, which keeps all scores, last
                    micro_batch_tokens   from 640 on (2,560 on a GPU), doubled as far as memory holds; on a CPU at most
                                         640 tokens a core
                    at once              on a CPU a micro-batch a core, or one on all cores
                    checkpointing        off; half or on where memory says so
    always          the heaviest training micro-batches forward and backward, the heaviest evaluation micro-batch
                    forward: of the way that holds the most, which protects the others

No way is timed: the first steps show what is fastest (`lorafit.trainer.trials`). But how steps are cut has to be known
before them, and on a card that depends on what starting a micro-batch costs there: two of them are timed.

No optimizer step is taken, gradients are cleared, random numbers and modes are put back.

The heaviest micro-batches that a run can meet under a token budget are made of its own rows:

    widest    as many of the longest rows as the budget takes: most attention a token
    fullest   the width that leaves the least of the budget unused: most tokens
    richest   where rows have images: the width at which the rows with most of them hold the most

Packed rows are filled to the last token, and hold two documents at least, so that whatever keeps them apart is there.

So `auto` becomes values, once: from the recipe, the resumed run, a given plan, the cache, or the rehearsal and the
first steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch

from lorafit.contracts import Example, Examples, Reporter
from lorafit.data.batch import LIKELY_GPU_COST_TOKENS, MICRO_BATCH_COST_TOKENS
from lorafit.errors import CheckpointError, ResourceError
from lorafit.files.cache import cache_folder, keep, kept, refuse_foreign
from lorafit.objective import TrainedTask
from lorafit.ops.attention_kernels import VARLEN
from lorafit.ops.process_memory import peak_memory_bytes
from lorafit.ops.recomputed_layers import CHECKPOINTING, more_than
from lorafit.plan import MOST_MICRO_BATCH_TOKENS, Plan, ResolvedPlan, Way
from lorafit.trainer.executor import out_of_memory, time_micro_batches
from lorafit.trainer.stage import Stage, open_ways, right_attentions
from lorafit.trainer.threaded_micro_batches import run_at_once
from lorafit.trainer.trials import forget_trials, most_ways, try_in_turn


def heaviest_shapes(
    lengths: Sequence[int], token_budget: int, most_rows: int, *, one_row: bool, images: Sequence[int] = ()
) -> list[tuple[int, int]]:
    """(rows, tokens of each) of the heaviest micro-batches.

    Args:
        lengths: Tokens of each row of the set.
        token_budget: Padded tokens of a micro-batch.
        most_rows: Rows of a step; a micro-batch never holds more.
        one_row: Whether packed documents fill one row as long as the budget.
        images: Tokens of each row that stand for images; empty where rows have none.
    """
    widths, places, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_inverse=True, return_counts=True)
    longest = int(widths[-1])
    if one_row:
        return [(1, max(token_budget, longest))]
    rows = np.minimum(np.minimum(token_budget // widths, np.cumsum(counts)), most_rows)
    rows[-1] = max(1, rows[-1])
    tokens = rows * widths
    chosen = [len(widths) - 1, int(np.flatnonzero(tokens == tokens.max())[-1])]
    if any(images):
        most = np.zeros_like(widths)
        np.maximum.at(most, places, np.asarray(images))
        chosen.append(int(np.argmax(rows * np.maximum.accumulate(most))))
    return [(int(rows[place]), int(widths[place])) for place in dict.fromkeys(chosen)]


def fill_rows(
    task: TrainedTask, examples: Examples, rows: int, width: int, *, packing: bool, images: Sequence[int] = ()
) -> list[list[Example]]:
    """Documents of so many rows of `width` tokens: the longest rows of the set, cut to fit (the end of them is kept).

    Fewer, or shorter ones, where the set is too small. Of rows with images, one as wide, and those that hold the most
    of them whole.
    """
    lengths = np.asarray(examples.lengths)
    longest_first = np.argsort(-lengths, kind="stable").tolist()
    if any(images):
        whole = [row for row in longest_first if lengths[row] <= width]
        richest = sorted(whole[1:], key=lambda row: -images[row])
        longest_first = [*whole[:1], *richest, *(row for row in longest_first if lengths[row] > width)]
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
    """Tells what the plan leaves open for the first steps to try, and tries the heaviest micro-batches of it.

    Raises:
        NumericsError: Packing is asked for, and documents in a row see each other.
        ResourceError: Not even the smallest candidate fits into memory, on one rank of a run: all of them raise it.
    """
    began = time.perf_counter()
    stage.reporter.info("rehearsing: proofs of attention and the run's heaviest steps, before step 1")
    with stage.rolled_back():
        told: list[ResolvedPlan] = []
        if stage.runs_out(lambda: told.append(_tell_what_is_open(stage, plan))):
            raise _no_memory(stage, plan.min_micro_batch_tokens)
        choice = stage.agreed(told[0]) or told[0]
        if choice.gradient_checkpointing != told[0].gradient_checkpointing:
            stage.set_checkpointing(choice.gradient_checkpointing)
        choice = _heaviest_that_fits(stage, choice, plan)
        stage.set_attention(choice.attention)
        if stage.device.type == "cuda":
            choice = replace(choice, micro_batch_cost_tokens=measure_cost(stage, choice))
    stage.measured["seconds"] = round(time.perf_counter() - began, 3)
    return choice


def _tell_what_is_open(stage: Stage, plan: Plan) -> ResolvedPlan:
    """What may be run and is right, nothing of it tried with much in memory."""
    asked = plan.gradient_checkpointing
    named = stage.attention if plan.attention == "auto" else plan.attention
    least = (each for each in CHECKPOINTING if stage.fits(_least_tokens(plan), each, named))
    checkpointing = next(least, True) if asked is None else asked
    stage.set_checkpointing(checkpointing)
    stage.objective.loss_chunk_bytes = plan.loss_chunk_bytes
    is_open = plan.attention == "auto"
    attentions = right_attentions(stage, _least_tokens(plan), checkpointing) if is_open else iter([plan.attention])
    ways = list(islice(open_ways(stage, plan, attentions, checkpointing), most_ways(plan.total_steps)))
    first, dtypes, where = ways[0], (plan.dtype, plan.compute_dtype), (stage.device.type, stage.executor.ranks)
    choice = ResolvedPlan(
        first.micro_batch_tokens, 0, first.attention, checkpointing, *dtypes, *where, "rehearsal", stage.measured
    )
    choice = replace(choice, keeps_unpacked=plan.keeps_unpacked, loss_chunk_bytes=plan.loss_chunk_bytes)
    return _with_evaluation_budget(stage, try_in_turn(choice, ways))


def _least_tokens(plan: Plan) -> int:
    return plan.min_micro_batch_tokens if plan.micro_batch_tokens is None else plan.micro_batch_tokens


def _heaviest_that_fits(stage: Stage, choice: ResolvedPlan, plan: Plan) -> ResolvedPlan:
    """The choice, or the next smaller one, and so on, until the heaviest runs; on every rank the same."""

    def hold_heaviest() -> None:
        stage.keep_unpacked(choice.keeps_unpacked)
        run_heaviest(stage, choice)

    while True:
        stage.clear()  # what the candidates left would stand beside the heaviest
        if not stage.runs_out(hold_heaviest):
            return choice
        smaller = stage.agreed(_smaller(stage, choice, plan))
        if smaller is None:
            raise _no_memory(stage, choice.micro_batch_tokens)
        if choice.keeps_unpacked and not smaller.keeps_unpacked:
            stage.keep_unpacked(False)
            stage.reporter.info("out of memory before step 1: dequantised weights are not kept")
        if smaller.gradient_checkpointing != choice.gradient_checkpointing:
            stage.set_checkpointing(smaller.gradient_checkpointing)
        choice = smaller


def _smaller(stage: Stage, choice: ResolvedPlan, plan: Plan) -> ResolvedPlan | None:
    """Lets go of unpacked copies, leaves the largest way out, halves the budget, then recomputes more layers; None:
    nothing is left.
    """
    budget = choice.micro_batch_tokens
    if choice.keeps_unpacked and plan.may_let_go_of_unpacked:
        return replace(choice, keeps_unpacked=False)
    if len(choice.ways) > 1:
        heaviest = _heaviest(choice)
        return try_in_turn(choice, [way for way in choice.ways if way != heaviest])
    if choice.micro_batches_at_once > 1:
        return replace(choice, micro_batches_at_once=1)
    if budget > _least_tokens(plan):
        smaller = replace(choice, micro_batch_tokens=max(_least_tokens(plan), budget // 2))
        return _with_evaluation_budget(stage, smaller)
    if plan.may_recompute_more and (more := more_than(choice.gradient_checkpointing)):
        return replace(choice, gradient_checkpointing=more[0])
    return None


def _no_memory(stage: Stage, micro_batch_tokens: int) -> ResourceError:
    return out_of_memory("before step 1", int(max(stage.examples.lengths)), micro_batch_tokens)


def _heaviest(choice: ResolvedPlan) -> Way:
    """The way that holds the most: the most tokens, all of their scores, and a gradient for each thread."""
    scores = {"eager": 2, "sdpa": 1}
    return max(
        choice.ways, key=lambda way: (way.tokens_at_once, scores.get(way.attention, 0), way.micro_batches_at_once)
    )


def _with_evaluation_budget(stage: Stage, choice: ResolvedPlan) -> ResolvedPlan:
    """An evaluation takes as large micro-batches as training, and its longest row at least."""
    longest = max(stage.validation.lengths, default=1) if stage.validation is not None else 1
    return replace(choice, evaluation_micro_batch_tokens=max(choice.micro_batch_tokens, int(longest)))


def run_heaviest(stage: Stage, choice: ResolvedPlan) -> None:
    """The heaviest micro-batches of training and of evaluation, with the optimizer's state in memory."""
    task, way = stage.objective.task, _heaviest(choice)
    stage.set_attention(way.attention)
    ballast = torch.empty(
        stage.kept_bytes if stage.device.type == "cuda" else 0, dtype=torch.uint8, device=stage.device
    )
    lengths, most_rows, images = stage.examples.lengths, stage.step_rows.batch_size, task.image_tokens(stage.examples)
    for rows, width in heaviest_shapes(
        lengths, way.micro_batch_tokens, most_rows, one_row=stage.cutter.one_row, images=images
    ):
        filled = fill_rows(task, stage.examples, rows, width, packing=stage.cutter.packs, images=images)
        batches = [task.collate(filled, stage.pad_id)] * way.micro_batches_at_once
        with run_at_once(stage.executor, way.micro_batches_at_once) as executor:
            time_micro_batches(executor, batches)
    if stage.validation is not None and len(stage.validation):
        count, tokens = len(stage.validation), choice.evaluation_micro_batch_tokens
        images = task.image_tokens(stage.validation)
        for rows, width in heaviest_shapes(stage.validation.lengths, tokens, count, one_row=False, images=images):
            filled = fill_rows(task, stage.validation, rows, width, packing=False, images=images)
            batch = task.collate(filled, stage.pad_id)
            stage.objective.eval()
            stage.objective.score(batch.to(stage.device))
            stage.objective.train()
    del ballast
    stage.measured["peak_memory_bytes"] = peak_memory_bytes(stage.device)


def measure_cost(stage: Stage, choice: ResolvedPlan) -> int:
    """Tokens that a card computes in the time that starting a forward and its backward takes.

    A short row is run, and a micro-batch of the first way's size; a straight line through both times says what none at
    all would take. Each is run twice: a first time sets up what the second finds. Rounded to a power of two, so that
    whoever repeats the run on such a card most likely cuts alike.
    """
    lengths, one_row = stage.examples.lengths, stage.cutter.one_row
    budget, most_rows = choice.micro_batch_tokens, stage.step_rows.batch_size
    rows, width = heaviest_shapes(lengths, budget, most_rows, one_row=one_row)[-1]
    filled = fill_rows(stage.objective.task, stage.examples, rows, width, packing=stage.cutter.packs)
    batches = [stage.shortest_batch(), stage.objective.task.collate(filled, stage.pad_id)]
    small, large = (batch.padded_tokens for batch in batches)
    if large < 2 * small:
        return LIKELY_GPU_COST_TOKENS
    quick, slow = (min(time_micro_batches(stage.executor, [batch]) for _ in range(2)) for batch in batches)
    for_each = (slow - quick) / (large - small)
    to_start = quick - small * for_each
    if to_start >= MOST_MICRO_BATCH_TOKENS * for_each:  # the card waits for the host even with the large one
        return MOST_MICRO_BATCH_TOKENS
    cost = max(MICRO_BATCH_COST_TOKENS, to_start / for_each)
    return 1 << round(math.log2(cost))


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
    source, values = known if known is not None else ("", None)
    source, values = stage.executor.gather(source)[0], stage.agreed(values)  # not every machine has the same cache
    if values is not None:
        choice = _taken(plan, values if source == "run" else forget_trials(values), stage)
        stage.apply(choice)
        if source == "plan":
            with stage.rolled_back():
                if stage.runs_out(lambda: run_heaviest(stage, choice)):
                    raise _no_memory(stage, choice.micro_batch_tokens)
                stage.apply(choice)
    else:
        source = "rehearsal" if is_open else "recipe"
        choice = rehearse(stage, plan)
    resolved = replace(
        choice,
        dtype=plan.dtype,
        compute_dtype=plan.compute_dtype,
        device_kind=stage.device.type,
        ranks=stage.executor.ranks,
        source=source if is_open else "recipe",
        kernels=stage.objective.kernels.name,
    )
    if stage.executor.ranks > 1:  # each looked at its own memory: rank 0's values
        resolved = ResolvedPlan.from_json(stage.executor.gather(resolved.to_json())[0])
        stage.apply(_taken(plan, resolved, stage))
    was_measured = source == "rehearsal" or resolved.micro_batch_cost_tokens is not None
    if cache_name is not None and values is None and was_measured and stage.executor.rank == 0:
        keep(cache_name, resolved.to_json())
    return resolved


def _taken(plan: Plan, values: ResolvedPlan, stage: Stage) -> ResolvedPlan:
    """What the recipe fixes, and for the rest `values`."""
    planned, checkpointing = plan.gradient_checkpointing, values.gradient_checkpointing
    if planned is not None and not (plan.may_recompute_more and checkpointing in more_than(planned)):
        checkpointing = planned
    choice = replace(
        values,
        gradient_checkpointing=checkpointing,
        keeps_unpacked=plan.keeps_unpacked and (values.keeps_unpacked or not plan.may_let_go_of_unpacked),
    )
    at_once = any(way.micro_batches_at_once > 1 for way in choice.ways)
    one_by_one = at_once and not stage.may_run_at_once(choice.gradient_checkpointing)

    def taken(way: Way) -> Way:
        known = "sdpa" if way.attention == VARLEN and not stage.takes_varlen else way.attention
        return Way(
            known if plan.attention == "auto" else plan.attention,
            way.micro_batch_tokens if plan.micro_batch_tokens is None else plan.micro_batch_tokens,
            1 if one_by_one or plan.micro_batch_tokens is not None else way.micro_batches_at_once,
        )

    return replace(choice.running(taken(choice.later)), first_steps=[taken(way) for way in choice.first_steps])


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
