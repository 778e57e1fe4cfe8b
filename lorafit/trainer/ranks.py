"""Several processes that train one model together, through accelerate: each runs its share of a step's micro-batches.

Gradients are summed once a step in one flat buffer, instead of DDP's averages over buckets: a rank may have any number
of micro-batches, none included.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate.utils import broadcast, gather_object

from lorafit.errors import DataError
from lorafit.trainer.executor import Executor

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lorafit.objective import Objective

T = TypeVar("T")
_PARTING_SECONDS = 0.5


class OverRanks(Executor):
    """This process's share of the micro-batches, one after the other.

    Args:
        objective: The same model in every process; the trained parameters become those of rank 0.
        accelerator: From `lorafit.trainer.journal`.
    """

    def __init__(self, objective: Objective, accelerator: Accelerator) -> None:
        super().__init__(objective, accelerator.device)
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self._accelerator = accelerator
        for parameter in self.parameters:
            parameter.data = broadcast(parameter.data)

    def sum(self, values: Sequence[float]) -> list[float]:
        return self._added(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """In one flat buffer; a rank without a micro-batch adds zeros."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        summed = self._added(torch.cat([gradient.flatten() for gradient in gradients]))
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, part in zip(self.parameters, torch.split(summed, sizes), strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def gather(self, value: T) -> list[T]:
        gathered: list[T] = gather_object([value])
        return gathered

    def _added(self, tensor: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self._accelerator.reduce(tensor, "sum")
        return added


def check_same_rows(accelerator: Accelerator, digest: str) -> None:
    """Refuses to train where the processes of a run hold different rows: a file differs between machines, or a template
    writes the date and it turned while they started.

    Args:
        accelerator: From `lorafit.trainer.journal`.
        digest: Of this process's rows, in hex.

    Raises:
        DataError: In every process.
    """
    if len(set(gather_object([digest]))) > 1:
        raise DataError(
            f"the {accelerator.num_processes} processes prepared different rows",
            key="data",
            todo="give each the same files; where the template writes the date and it just turned, start again",
        )


def leave_together(accelerator: Accelerator) -> None:
    """Barrier before the process group is destroyed; works around a deadlock of gloo.

    gloo's threads drop a finished collective a moment after it returned, and need the interpreter's lock to do so; a
    group that is destroyed in that moment waits for its threads with the lock in hand, for ever.
    """
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        time.sleep(_PARTING_SECONDS)
