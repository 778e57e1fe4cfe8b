"""What a task asks of the model before it is trained: one pass over the rows, whose results are columns of them.

    rows ──objective as it is at step 0──> task.refer ──> a column, kept in the cache ──> rows with that column

A preference task's log-probabilities of the reference are such a column: they are computed once for a base, an initial
adapter, a set of rows and a precision, and no second model is held.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lorafit.contracts import JsonMapping, Reporter
from lorafit.data.batch import cut_step
from lorafit.data.store import ExampleSet
from lorafit.evaluation.base_side import read_arrays
from lorafit.files.atomic import atomic_file
from lorafit.files.cache import cache_folder, own_folder
from lorafit.kinds.tasks import Task, TaskSection
from lorafit.objective import Objective
from lorafit.ops.isolation import evaluating

_MICRO_BATCH_TOKENS = 2048


def add_reference(
    objective: Objective,
    task: Task[TaskSection],
    splits: Mapping[str, ExampleSet],
    made_of: JsonMapping,
    pad_id: int,
    reporter: Reporter,
) -> dict[str, ExampleSet]:
    """Rows by split with the columns that the task refers to.

    Args:
        objective: With the model as it is before the first step.
        task: Its task, which has such columns.
        splits: The rows.
        made_of: What decides the values beside rows, task and device: base, initial adapter, precision.
        pad_id: Fills up shorter rows.
        reporter: Gets a bar.

    Raises:
        ResourceError: The cache cannot be written.
    """
    cache, device = cache_folder() / "reference", objective.device.type
    own_folder(cache)
    found = {}
    for split, examples in splits.items():
        parts = {**made_of, "task": task.section.kind, "rows": examples.digest(), "device": device}
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]
        file = cache / f"{key}.safetensors"
        values, rows = read_arrays(file), len(examples)
        wanted = {column.name: (rows, column.width or 1) for column in task.reference_columns}
        if values is None or {name: array.shape for name, array in values.items()} != wanted:  # not there, or not whole
            values = _refer(objective, task, examples, pad_id, reporter)
            with atomic_file(file) as temporary:
                save_file(values, temporary)
        found[split] = examples.with_columns(values)
    return found


def _refer(
    objective: Objective, task: Task[TaskSection], examples: ExampleSet, pad_id: int, reporter: Reporter
) -> dict[str, NDArray[np.float64]]:
    columns = task.reference_columns
    found = {column.name: np.zeros((len(examples), column.width or 1)) for column in columns}
    tokens = max(_MICRO_BATCH_TOKENS, int(max(examples.lengths, default=1)))
    cut = cut_step(range(len(examples)), examples.lengths, tokens)
    with evaluating(objective), reporter.track(len(examples), "reference") as bar:
        for members in cut:
            batch = task.collate([[examples[row]] for row in members], pad_id).to(objective.device)
            with objective.autocast(batch):
                values = task.refer(objective, batch)
            for column in columns:
                found[column.name][np.asarray(members)] = values[column.name].reshape(len(members), -1)
            bar.advance(len(members))
    return found
