"""Executors: the ways in which the micro-batches of an optimizer step are run. Loop, rehearsal and dry run take one.

    Executor      one after the other, in this process; the dry run's too, whose tensors are fake
    InThreads     on a CPU several at once, a core each (`lorafit.trainer.threaded_micro_batches`)
    OverRanks     each process runs its share of them (`lorafit.trainer.ranks`)

    cores   one by one     1 1  2 2  3 3  4 4       every product is cut into a piece a core, and waited for
            in threads     1111 2222                each core takes the next micro-batch and does it whole
                           3333 4444
    ranks                  1 1  3 3                 no communication until all are done: then gradients are summed
                           2 2  4 4

Whatever an executor does, `.grad` holds d(sum of all losses / weight) afterwards, the weight being that of the whole
step: nothing is averaged over micro-batches or ranks, so that there is nothing to undo.

What says that memory ran out, and what gives it back behind a step, stands here too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Self, TypeVar

import torch

from lorafit.contracts import Batch
from lorafit.errors import ResourceError
from lorafit.model.fused_lora import cast_adapters
from lorafit.objective import Objective
from lorafit.ops.isolation import without_training
from lorafit.ops.matmul_peak import wait_for
from lorafit.ops.process_memory import trim_heap
from lorafit.trainer.profile import NO_PROFILE, NoProfile

T = TypeVar("T")
_TRIMMED_AFTER_SECONDS = 1.0  # shorter steps leave little behind, and would feel it


def no_check() -> None:
    """What is called after a micro-batch where nothing can end a step early."""


class Executor:
    """Runs micro-batches one after the other in this process, which trains alone; other ways are derived from it.

    Used as a context: at its end nothing of it is left running.

    Args:
        objective: Model and loss, on its device, in training mode when it runs.
        device: That device.

    Attributes:
        named_parameters: The trained ones with their names, those among them that a hook freezes for now.
        parameters: Without.
        scaler: fp16's loss scale; switched off, it does nothing, in other precisions.
        profile: Told when forward and backward begin and end; set once the run's own steps begin.
        rank: Number of this process among those that train together, from 0.
        ranks: Their number.
    """

    rank, ranks = 0, 1

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self.objective, self.device = objective, device
        self.profile: NoProfile = NO_PROFILE
        self.named_parameters = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
        self.parameters = [parameter for _, parameter in self.named_parameters]
        self.scaler = torch.amp.GradScaler(device.type, enabled=objective.autocast_dtype == torch.float16)

    @property
    def unfrozen(self) -> list[torch.nn.Parameter]:
        """Those that the step in hand trains."""
        return [parameter for parameter in self.parameters if parameter.requires_grad]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def accumulate(
        self, batches: Sequence[Batch], weight: float, after_each: Callable[[], None] = no_check
    ) -> list[torch.Tensor]:
        """Adds the gradient of (sum of the losses) / weight to `.grad`. Nothing waits for the device.

        Args:
            batches: This rank's micro-batches, on the CPU; may be none.
            weight: Labels of the whole step, over all ranks.
            after_each: Called after each micro-batch; what it raises ends the step.

        Returns:
            The summed loss of each micro-batch.
        """
        losses = []
        objective = self.objective
        with cast_adapters(objective.model, objective.autocast_dtype if objective.kernels.casts_once else None):
            for batch in batches:
                with self.profile.phase("forward"):
                    loss_sum = objective(batch.to(self.device)).loss_sum
                    loss = self.scaler.scale(loss_sum / weight)
                with self.profile.phase("backward"):
                    loss.backward()
                losses.append(loss_sum.detach())
                after_each()
        return losses

    def pool(self, batches: Sequence[Batch], after_each: Callable[[], None] = no_check) -> list[torch.Tensor]:
        """What the task pools of each micro-batch, by the model in eval mode, without gradients.

        Args:
            batches: This rank's micro-batches, on the CPU; may be none.
            after_each: Called after each micro-batch; what it raises ends the step.
        """
        found = []
        with without_training(self.objective), self.profile.phase("forward"):
            for batch in batches:
                found.append(self.objective.pool(batch.to(self.device)))
                after_each()
        return found

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value, added over all ranks in fp64; the same on every rank."""
        return list(values)

    def sum_gradients(self) -> None:
        """Adds `.grad` over all ranks; of one they are the sum already."""

    def gather(self, value: T) -> list[T]:
        """Each rank's value, by rank; waits until every rank has given its own."""
        return [value]


def time_micro_batches(executor: Executor, batches: Sequence[Batch]) -> float:
    """Seconds of one forward and backward of each in training mode; the gradients are dropped."""
    executor.objective.train()
    wait_for(executor.device)
    began = time.perf_counter()
    executor.accumulate(batches, max(1, sum(batch.weight for batch in batches)))
    wait_for(executor.device)
    seconds = time.perf_counter() - began
    for parameter in executor.parameters:
        parameter.grad = None
    return seconds


def out_of_memory(where: str, longest_tokens: int, micro_batch_tokens: int) -> ResourceError:
    """The error a user sees.

    Args:
        where: E.g. `at step 12`.
        longest_tokens: Sequence length of the longest row of that step.
        micro_batch_tokens: The token budget in force.
    """
    return ResourceError(
        f"out of memory {where}: seq length {longest_tokens}, micro_batch_tokens {micro_batch_tokens}",
        todo="lower training.micro_batch_tokens or data.max_length, or set training.gradient_checkpointing: true",
    )


def trim_after(seconds: float, device: torch.device) -> None:
    """Gives a CPU's free heap back after a long step: else it grows, as each step takes blocks of other sizes."""
    if device.type == "cpu" and seconds > _TRIMMED_AFTER_SECONDS:
        trim_heap()
