"""From a recipe to everything that `lorafit estimate-memory` says of it."""

from __future__ import annotations

from lorafit.errors import UsageError
from lorafit.estimation.answer import Options, RowLengths
from lorafit.estimation.compare_methods import compare_methods
from lorafit.estimation.fit import find_fit
from lorafit.estimation.table import RecipeEstimate
from lorafit.estimation.ways_to_save import find_enough, find_savings
from lorafit.facts import DeviceFacts, ModelShape
from lorafit.memory import Engine, closed_form, covers, fits
from lorafit.ops.attention_kernels import VARIABLE_LENGTH_ATTENTION
from lorafit.plan.bounds import memory_bounds
from lorafit.plan.derive import run_epochs
from lorafit.plan.recipe_step import HEADROOM, asks_to_keep, recipe_step
from lorafit.plan.run_cost import cost_of_run
from lorafit.recipe.schema import Recipe

MOST_HEADROOM = 0.9
_NO_ROWS, _NO_OPTIONS = RowLengths(), Options()


def check_headroom(headroom: float | None, device: DeviceFacts | None) -> float:
    """The share that stays free: the default where none is given.

    Raises:
        UsageError: It is no share, or there is no card of which it could be one.
    """
    if headroom is None:
        return HEADROOM
    if not 0.0 <= headroom <= MOST_HEADROOM:  # NaN too
        todo = f"a share lies in the range 0 to {MOST_HEADROOM}"
        raise UsageError(f"{headroom} is out of range", key="--headroom", todo=todo)
    if device is None:
        raise UsageError("a headroom needs a card", key="--headroom", todo="name one with --gpu or --fit")
    return headroom


def estimate_recipe(
    recipe: Recipe,
    shape: ModelShape,
    rows: RowLengths = _NO_ROWS,
    options: Options = _NO_OPTIONS,
    engine: Engine = closed_form,
) -> RecipeEstimate:
    """What a recipe needs.

    Where micro_batch_tokens is `auto`, one longest row is assumed; where gradient_checkpointing is, none, unless the
    card of `--gpu` needs it. Where each estimate is a dry run, other methods are looked at for a card alone, and
    savings only where it does not fit.

    Args:
        recipe: The recipe.
        shape: Its model.
        rows: The real rows; without them a row of data.max_length is assumed, of which every token may carry loss.
        options: Of the command line.
        engine: What answers for the memory of a step.

    Raises:
        RecipeError: The adapter's targets match nothing, or sdpa was asked of a model with a soft-cap.
    """
    headroom, device, facts = options.headroom, options.card, rows.facts
    asked = recipe_step(recipe, shape, facts, device, headroom=headroom, engine=engine, pictures=rows.pictures)
    step = asked.step
    memory, without = asked.settle(device, headroom)
    tokens, checkpointing = memory.micro_batch_tokens, memory.gradient_checkpointing
    misses = device is not None and not fits(memory, device.memory_bytes, headroom)
    is_quick = covers(step)
    counted_on = device if memory.counts_all else None  # a figure that is too low fits nowhere
    epochs = run_epochs(recipe, facts.rows) if facts is not None else 0.0
    fit = None
    if options.fit is not None and memory.counts_all:
        on_it = recipe_step(recipe, shape, facts, options.fit, headroom=headroom, engine=engine, pictures=rows.pictures)
        on_it = on_it.changed(loss_chunk_bytes=None)  # they make room for what is searched for
        if asks_to_keep(recipe.model.quantization) is None:
            on_it = on_it.changed(keeps_unpacked=False)
        fit = find_fit(on_it, options.fit, headroom)
    here = None
    if options.here is not None and is_quick and recipe.model.attention not in VARIABLE_LENGTH_ATTENTION:
        planned = recipe_step(
            recipe, shape, facts, options.here, headroom=headroom, engine=engine, pictures=rows.pictures
        )
        batch = recipe.training.batch_size
        here = memory_bounds(planned, min(batch, facts.rows if facts else batch), options.here)
    has_others = memory.counts_all and (is_quick or device is not None)
    return RecipeEstimate(
        recipe=recipe,
        asked=asked,
        memory=memory,
        rows=rows,
        options=options,
        without_checkpointing=without,
        epochs=epochs,
        cost=cost_of_run(
            step,
            facts,
            epochs=epochs,
            checkpointing=checkpointing,
            device=device,
            price_per_hour=options.price_per_hour,
        ),
        methods=compare_methods(asked, tokens, checkpointing, device, headroom) if has_others else (),
        savings=find_savings(asked, checkpointing, counted_on, headroom) if is_quick or misses else (),
        enough=find_enough(asked, checkpointing, counted_on, headroom) if counted_on is not None and misses else None,
        fit=fit,
        here=here,
    )
