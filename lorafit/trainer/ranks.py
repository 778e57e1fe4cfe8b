"""Several processes that train one model together, through accelerate: each runs its share of a step's micro-batches.

Gradients are summed once a step, when each rank has done its part, instead of DDP's averages while the backward runs: a
rank may have any number of micro-batches, none included.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate.utils import broadcast, gather_object
from torch import distributed

from lorafit.contracts import Batch
from lorafit.errors import DataError, ResourceError
from lorafit.trainer.executor import Executor, no_check

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lorafit.objective import Objective

T = TypeVar("T")
_PARTING_SECONDS = 0.5
_BUCKET_BYTES = 64 << 20
_GONE = ("closed by peer", "reset by peer", "broken pipe", "timed out")


def _held(objective: Objective) -> Iterator[torch.Tensor]:
    """All of the adapters, what is not trained among it: first values that each rank has computed for itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in objective.modules():
        for name in layer.adapter_layer_names if isinstance(layer, BaseTunerLayer) else ():
            group = getattr(layer, name, None)
            if isinstance(group, torch.nn.Module):
                yield from (*group.parameters(), *group.buffers())


class OverRanks(Executor):
    """This process's share of the micro-batches, one after the other.

    Args:
        objective: The same model in every process; what is trained, and all that adapters hold, becomes rank 0's.
        accelerator: From `lorafit.trainer.journal`.
    """

    def __init__(self, objective: Objective, accelerator: Accelerator) -> None:
        super().__init__(objective, accelerator.device)
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        with _together():
            for tensor in {id(tensor): tensor for tensor in (*self.parameters, *_held(objective))}.values():
                tensor.data = broadcast(tensor.data)
        self._buckets = _in_buckets(self.parameters)
        self._flat = torch.empty(_BUCKET_BYTES, dtype=torch.uint8, device=self.device)

    def accumulate(
        self, batches: Sequence[Batch], weight: float, after_each: Callable[[], None] = no_check
    ) -> list[torch.Tensor]:
        losses = super().accumulate(batches, weight, after_each)
        for parameter in self.unfrozen:
            _gradient(parameter)  # of zeros without a micro-batch; now, as `sum_gradients` must not run out of memory
        return losses

    def sum(self, values: Sequence[float]) -> list[float]:
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        with _together():
            distributed.all_reduce(summed)
        return summed.tolist()

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """In place, bucket by bucket; takes no memory, so that no rank can fail where the others wait for it."""
        for bucket in self._buckets:
            gradients = [_gradient(parameter) for parameter in bucket if parameter.requires_grad]
            if len(gradients) < 2:
                for gradient in gradients:
                    with _together():
                        distributed.all_reduce(gradient)
                continue
            sizes = [gradient.numel() for gradient in gradients]
            flat = self._flat.view(gradients[0].dtype)[: sum(sizes)]
            torch.cat([gradient.flatten() for gradient in gradients], out=flat)
            with _together():
                distributed.all_reduce(flat)
            for gradient, part in zip(gradients, torch.split(flat, sizes), strict=True):
                gradient.copy_(part.view_as(gradient))

    def gather(self, value: T) -> list[T]:
        with _together():
            gathered: list[T] = gather_object([value])
        return gathered


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _in_buckets(parameters: Sequence[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Neighbours that are small enough together to be summed as one; a larger parameter is alone."""
    buckets: list[list[torch.nn.Parameter]] = []
    room = -1
    for parameter in parameters:
        if parameter.nbytes > room or parameter.dtype != buckets[-1][-1].dtype:
            buckets.append([])
            room = _BUCKET_BYTES
        buckets[-1].append(parameter)
        room -= parameter.nbytes
    return buckets


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Around what all ranks do together.

    Raises:
        ResourceError: Another one is gone, or came too late.
    """
    try:
        yield
    except RuntimeError as error:  # gloo has no class of its own
        if not isinstance(error, distributed.DistError) and not any(words in str(error).lower() for words in _GONE):
            raise
        raise ResourceError(
            "lost another process of the run", todo="its own message says why; mend that, and go on with --resume"
        ) from error


def check_same_rows(accelerator: Accelerator, digest: str) -> None:
    """Refuses to train where the processes of a run hold different rows: a file differs between machines, or a template
    writes the date and it turned while they started.

    Args:
        accelerator: From `lorafit.trainer.journal`.
        digest: Of this process's rows, in hex.

    Raises:
        DataError: In every process.
    """
    with _together():
        digests = set(gather_object([digest]))
    if len(digests) > 1:
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
        with _together():
            accelerator.wait_for_everyone()
        time.sleep(_PARTING_SECONDS)
