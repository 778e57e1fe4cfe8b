"""How hard each training row is, by the recipe's curriculum: measured once, and kept with the run for its resumes.

lengths, a column of the files, losses of the model at step 0 ──kind──> a number a row ──> curriculum.safetensors
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lorafit.console.wording import counted
from lorafit.contracts import Reporter
from lorafit.errors import CheckpointError, DataError
from lorafit.files.atomic import atomic_file
from lorafit.job import Job
from lorafit.kinds.curricula import MeasurableRows, curricula, pool_size

if TYPE_CHECKING:
    from lorafit.objective import Objective
    from lorafit.trainer.checkpoint import Checkpoint
    from lorafit.trainer.executor import Executor

_MICRO_BATCH_TOKENS = 2048
_NAME = "difficulty"


def known_difficulty(job: Job) -> NDArray[np.float64] | None:
    """How hard each training row is, as far as no model is needed to tell.

    Raises:
        DataError: A row has no number in the column that tells.
    """
    section = job.recipe.training.curriculum
    if section is None or curricula.bind(section).reads_losses:
        return None
    return _measure(job, lambda: ())


def find_difficulty(
    job: Job,
    objective: Objective,
    executor: Executor,
    file: Path,
    reporter: Reporter,
    checkpoint: Checkpoint | None,
) -> NDArray[np.float64] | None:
    """How hard each training row is, the same on every rank; None without a curriculum.

    Args:
        job: Whose rows.
        objective: With the model as it is before step 1, where a run begins.
        executor: Its ranks share the rows.
        file: Where a run keeps what it began with.
        reporter: Gets a bar.
        checkpoint: What is gone on with; None where the run begins.

    Raises:
        CheckpointError: What the run began with is not there any more.
        DataError: A row has no number in the column that tells.
    """
    if job.recipe.training.curriculum is None:
        return None
    if checkpoint is not None:
        from lorafit.evaluation.base_side import read_arrays

        kept = (read_arrays(file) or {}).get(_NAME)
        if kept is None or len(kept) != len(job.rows.train):
            what = "is missing or damaged, and tells which rows the next steps are drawn from"
            raise CheckpointError(what, file=str(file), todo="copy it back, or start the run again")
        return kept
    found = _measure(job, lambda: _losses(job, objective, executor, reporter))
    return np.asarray(executor.gather(found.tolist())[0]) if executor.ranks > 1 else found


def keep_difficulty(file: Path, difficulty: NDArray[np.float64] | None) -> None:
    """Writes down what a run begins with, where it has a curriculum."""
    from safetensors.numpy import save_file

    if difficulty is not None:
        with atomic_file(file) as temporary:
            save_file({_NAME: difficulty}, temporary)


def describe_curriculum(job: Job) -> str | None:
    """What steps are drawn from, in a sentence for a preview; None without a curriculum."""
    section, difficulty = job.recipe.training.curriculum, known_difficulty(job)
    if section is None:
        return None
    measures = curricula.bind(section).measures
    if difficulty is None:
        return f"easiest rows first, by {measures}, which the model tells before step 1"
    ordered = curricula.bind(section).sign * np.sort(difficulty)
    first = pool_size(section.easiest, len(ordered), 1)
    easiest = f"the easiest {first} of {counted(len(ordered), 'row')}, {ordered[0]:g} to {ordered[first - 1]:g}"
    return f"easiest rows first, by {measures}: step 1 is drawn from {easiest}; the hardest has {ordered[-1]:g}"


def _measure(job: Job, losses: Callable[[], Sequence[float]]) -> NDArray[np.float64]:
    rows, section = job.rows.train, job.recipe.training.curriculum
    assert section is not None
    asked = MeasurableRows(rows.lengths, losses, lambda column: _numbers(job, column))
    kind = curricula.bind(section)
    return kind.sign * np.asarray(kind.measure(asked), dtype=np.float64)


def _numbers(job: Job, column: str) -> list[float]:
    """What each training row has in a column of its file; the rows that were cut from one have the same."""
    rows = job.rows.train
    found = {(source, line): value for source, line, value in job.rows.samples("train").numbers(column)}
    values = [found[place] for place in zip(np.asarray(rows.source_of).tolist(), rows.lines.tolist(), strict=True)]
    for value in values:
        if isinstance(value, DataError):
            raise value
    return [value for value in values if isinstance(value, float)]


def _losses(job: Job, objective: Objective, executor: Executor, reporter: Reporter) -> list[float]:
    from lorafit.evaluation.runner import score_examples
    from lorafit.ops.isolation import evaluating

    rows = job.rows.train
    tokens = max(_MICRO_BATCH_TOKENS, int(max(rows.lengths, default=1)))
    with evaluating(objective):
        scored = score_examples(
            objective,
            rows,
            micro_batch_tokens=tokens,
            pad_id=job.pad_id,
            reporter=reporter,
            ranks=executor,
            what="losses at step 0",
        )
    return [row.value("loss") / (row.value("weight") or 1.0) for row in scored]
