"""`auto` becomes values, once: from the recipe, the resumed run, a given plan, the cache, or the rehearsal."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.errors import LorafitError, SafetyError
from lorafit.files.atomic import write_json
from lorafit.files.cache import own_folder, refuse_foreign
from lorafit.files.strict_json import JsonError, read_json_file
from lorafit.plan import ResolvedPlan
from lorafit.trainer.rehearsal import rehearse, try_heaviest
from lorafit.trainer.stage import Choice, Stage

if TYPE_CHECKING:
    from lorafit.contracts import Reporter
    from lorafit.plan import Plan


def cached_plan_file(cache_folder: Path, parts: Sequence[str]) -> Path:
    """Where the values for (recipe, data, device, versions) are kept."""
    key = hashlib.sha256("\0".join(parts).encode("utf-8")).hexdigest()
    return cache_folder / "plans" / f"{key}.json"


def resolve_plan(
    plan: Plan,
    stage: Stage,
    *,
    resumed: ResolvedPlan | None = None,
    given: ResolvedPlan | None = None,
    cache_file: Path | None = None,
) -> ResolvedPlan:
    """Settles every open value of the plan and makes the model run so.

    What the recipe fixes stays; all that it leaves open comes from one source. The heaviest micro-batches are tried
    unless this very run, or one with the same recipe, data, device and versions, has tried them before.

    Args:
        plan: What the recipe fixes, and bounds.
        stage: What candidates are tried on.
        resumed: The values that the resumed run was trained with.
        given: Those of another run (`--plan`).
        cache_file: From `cached_plan_file`; read, and written after a rehearsal.

    Raises:
        ResourceError: The heaviest micro-batch does not fit into memory.
    """
    cached = _read_cached(cache_file, stage.reporter)
    is_open = plan.attention == "auto" or None in (plan.gradient_checkpointing, plan.micro_batch_tokens)
    known = next(((s, v) for s, v in (("run", resumed), ("plan", given), ("cache", cached)) if v is not None), None)
    if known is not None:
        source, values = known
        choice = _taken(plan, values, stage)
        if source == "plan":
            try_heaviest(stage, choice)
        stage.apply(choice)
        measured = values.measured
    else:
        source = "rehearsal" if is_open else "recipe"
        if is_open:
            kept = "kept for this recipe with this seed; --plan takes another run's"
            stage.reporter.info(f"rehearsal: measuring attention and micro-batches on this run's rows, {kept}")
        choice = rehearse(stage, plan)
        measured = stage.measured
    resolved = ResolvedPlan(
        **asdict(choice),
        dtype=plan.dtype,
        compute_dtype=plan.compute_dtype,
        device_kind=stage.device.type,
        ranks=stage.executor.ranks,
        source=source if is_open else "recipe",
        measured=measured,
    )
    if stage.executor.ranks > 1:  # each measured for itself, and clocks differ: rank 0's values
        resolved = ResolvedPlan.from_json(stage.executor.gather(resolved.to_json())[0])
        stage.apply(_taken(plan, resolved, stage))
    if cache_file is not None and cached is None and source == "rehearsal" and stage.executor.rank == 0:
        own_folder(cache_file.parent)
        write_json(cache_file, resolved.to_json())
    return resolved


def _taken(plan: Plan, values: ResolvedPlan, stage: Stage) -> Choice:
    """What the recipe fixes, and for the rest `values`."""
    tokens, checkpointing = plan.micro_batch_tokens, plan.gradient_checkpointing
    choice = Choice(
        values.micro_batch_tokens if tokens is None else tokens,
        values.evaluation_micro_batch_tokens,
        values.attention if plan.attention == "auto" else plan.attention,
        values.gradient_checkpointing if checkpointing is None else checkpointing,
        values.micro_batches_at_once if tokens is None else 1,
    )
    if choice.micro_batches_at_once > 1 and not stage.may_run_at_once(choice.gradient_checkpointing):
        return replace(choice, micro_batches_at_once=1)
    return choice


def _read_cached(cache_file: Path | None, reporter: Reporter) -> ResolvedPlan | None:
    """What the cache holds; anything unreadable is measured anew."""
    if cache_file is None or not cache_file.is_file():
        return None
    try:
        refuse_foreign(cache_file.parent)
        return ResolvedPlan.from_json(read_json_file(cache_file), str(cache_file))
    except SafetyError:
        raise
    except (OSError, JsonError, LorafitError) as error:
        reporter.info(f"ignored a cached plan that cannot be read ({error})")
        return None
