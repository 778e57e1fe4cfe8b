"""What the base is scored by, where its own head is only drawn: one fitted to its frozen states of the training rows.

    training rows ──base, adapter off──> task.fit_base ──> a few arrays, kept in the run folder ──> task.score_base

So base and tuned model have learnt from the same rows, and what is between them is what the adapter did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lorafit.contracts import Batch, Examples, Reporter
from lorafit.data.batch import cut_step
from lorafit.files.atomic import atomic_file
from lorafit.kinds.tasks import Task, TaskSection
from lorafit.objective import Objective
from lorafit.ops.isolation import adapter_off, evaluating

_MICRO_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class FittedBase:
    """Scores rows as an objective does, by the base with what was fitted to it."""

    objective: Objective
    task: Task[TaskSection]
    fitted: Mapping[str, NDArray[np.float64]]

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return self.objective.device

    def score(self, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """Sums over each row by name; `loss` and `weight` among them."""
        with self.objective.autocast(batch):
            return self.task.score_base(self.objective, batch, self.fitted)


def read_arrays(file: Path) -> dict[str, NDArray[np.float64]] | None:
    """What an earlier command kept; None where there is nothing, or it is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found: dict[str, NDArray[np.float64]] = load_file(file)
    except (OSError, SafetensorError):
        return None
    return found


def fit_base(
    objective: Objective,
    task: Task[TaskSection],
    train: Examples,
    held_out: Examples | None,
    file: Path,
    pad_id: int,
    reporter: Reporter,
) -> dict[str, NDArray[np.float64]]:
    """Fits the base's head and keeps it.

    Args:
        objective: Around the base with its adapter, which is off meanwhile.
        task: Its task.
        train: The rows that were trained on.
        held_out: Rows that choose between fits, the run's validation rows; the task parts its training rows where None.
        file: Where it is kept.
        pad_id: Fills up shorter rows.
        reporter: Gets bars.

    Raises:
        ResourceError: The file cannot be written.
    """
    from safetensors.numpy import save_file

    read = partial(_read, objective, task, pad_id, reporter, "base model, its rows")
    with evaluating(objective), adapter_off(objective.model):
        choosing = read(held_out) if held_out is not None else None
        fitted = dict(task.fit_base(objective, read(train), choosing, reporter))
    with atomic_file(file) as temporary:
        save_file({name: np.ascontiguousarray(values) for name, values in fitted.items()}, temporary)
    return fitted


def start_head(
    objective: Objective,
    task: Task[TaskSection],
    train: Examples,
    held_out: Examples | None,
    pad_id: int,
    reporter: Reporter,
) -> None:
    """Gives the head of a model that is about to be trained the values with which it begins, where its task fits them.

    Args:
        objective: Around the model as it begins; only its head is changed.
        task: Its task.
        train: The rows that will be trained on.
        held_out: Rows that choose between fits; the task parts its training rows where None.
        pad_id: Fills up shorter rows.
        reporter: Gets bars.
    """
    if not task.starts_head:
        return
    read = partial(_read, objective, task, pad_id, reporter, "what the head reads")
    with evaluating(objective):
        task.start_head(objective, read(train), read(held_out) if held_out is not None else None, reporter)


def _read(
    objective: Objective, task: Task[TaskSection], pad_id: int, reporter: Reporter, what: str, examples: Examples
) -> Iterator[Batch]:
    """Micro-batches of all rows, on the model's device."""
    tokens = max(_MICRO_BATCH_TOKENS, int(max(examples.lengths, default=1)))
    cut = cut_step(range(len(examples)), examples.lengths, tokens)
    with reporter.track(len(examples), what) as bar:
        for members in cut:
            batch = task.collate([[examples[row]] for row in members], pad_id)
            yield batch.to(objective.device)
            bar.advance(len(members))
