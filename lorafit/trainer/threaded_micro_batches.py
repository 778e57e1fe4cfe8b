"""Micro-batches abreast: on a CPU, several of a step's micro-batches at once, each on a core of its own.

    cores   one by one     1 1  2 2  3 3  4 4       every product is cut into a piece a core, and waited for
            abreast        1111 2222                each core takes the next micro-batch and does it whole
                           3333 4444

The products of a small model are too small to be worth sharing: two cores do them 1.4 times as fast as one. The sum is
the same: each thread computes its micro-batch's gradient for itself, and the gradients are added in a fixed order, the
most tokens first, whichever is done first. That is the order in which they are begun, too: the last ones are short.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorafit.model.fuse import drops_only_in_adapters
from lorafit.ops.dropout import draw_seed, drawing_from

if TYPE_CHECKING:
    from lorafit.contracts import Batch
    from lorafit.objective import Objective

Gradients = tuple[torch.Tensor | None, ...]
_MUTABLE_ROTARY = ("dynamic", "longrope")  # their frequencies change with the longest row so far


def threads_abreast(objective: Objective, device: torch.device, ranks: int, *, checkpointing: bool) -> int:
    """How many micro-batches may run at once: the threads of a CPU, or 1 where threads would disturb each other.

    They would where layers change in a forward, or draw random numbers from the generator that all share. Adapters
    draw their dropout from a generator a micro-batch, which checkpointing's second forward would not draw again.
    """
    if device.type != "cpu" or ranks > 1 or objective.exact:
        return 1
    config = objective.base.config
    rotary = getattr(config, "rope_parameters", None) or {}
    is_fixed = str(rotary.get("rope_type", "default")) not in _MUTABLE_ROTARY
    drops = any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in objective.modules())
    draws = bool(getattr(config, "attention_dropout", 0.0)) or not drops_only_in_adapters(objective)
    return torch.get_num_threads() if is_fixed and not draws and not (drops and checkpointing) else 1


class Abreast:
    """Threads that each take one micro-batch at a time. Use it as a context: at its end none is left running.

    Args:
        count: Threads; one core each.
        parameters: Trained ones: their gradients are computed.
    """

    def __init__(self, count: int, parameters: Sequence[nn.Parameter]) -> None:
        self.count, self._parameters = count, list(parameters)
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Abreast:
        self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="lorafit-micro-batch")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def accumulate(
        self, objective: Callable[[Batch], Any], batches: Sequence[Batch], weight: float, after_each: Callable[[], None]
    ) -> list[torch.Tensor]:
        """Adds the gradient of sum(losses) / weight to `.grad`.

        Args:
            objective: In training mode.
            batches: On the CPU.
            weight: Labels of the whole step.
            after_each: Called in this thread when a micro-batch's turn is over; what it raises ends the step.

        Returns:
            Each micro-batch's summed loss.
        """
        assert self._pool is not None, "outside of its context"
        threads = torch.get_num_threads()
        order = sorted(range(len(batches)), key=lambda number: -batches[number].padded_tokens)
        futures: list[Future[tuple[torch.Tensor, Gradients]]] = [
            self._pool.submit(self._differentiate, objective, batches[number], weight, draw_seed()) for number in order
        ]
        losses: dict[int, torch.Tensor] = {}
        try:
            for number in order:
                losses[number], gradients = futures.pop(0).result()  # a future holds its gradients
                self._add(gradients)
                del gradients
                after_each()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)
            torch.set_num_threads(threads)  # some libraries have one number for all threads
        return [losses[number] for number in range(len(batches))]

    def _differentiate(
        self, objective: Callable[[Batch], Any], batch: Batch, weight: float, seed: int
    ) -> tuple[torch.Tensor, Gradients]:
        torch.set_num_threads(1)
        with drawing_from(seed):
            loss_sum, _, _ = objective(batch)
        gradients = torch.autograd.grad(loss_sum / weight, self._parameters, allow_unused=True)
        return loss_sum.detach(), gradients

    @torch.no_grad()
    def _add(self, gradients: Gradients) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)


@contextlib.contextmanager
def abreast_of(objective: Objective, count: int) -> Iterator[Abreast | None]:
    """Threads over what the objective trains; None where one micro-batch at a time is asked for."""
    if count == 1:
        yield None
        return
    with Abreast(count, [parameter for parameter in objective.parameters() if parameter.requires_grad]) as abreast:
        yield abreast


def time_micro_batches(
    objective: Objective, batches: Sequence[Batch], device: torch.device, abreast: Abreast | None = None
) -> float:
    """Seconds of one forward and backward of each in training mode; the gradients are dropped."""
    objective.train()
    _wait(device)
    began = time.perf_counter()
    weight = max(1, sum(batch.weight for batch in batches))
    if abreast is not None:
        abreast.accumulate(objective, batches, weight, lambda: None)
    else:
        for batch in batches:
            loss_sum, _, _ = objective(batch.to(device))
            (loss_sum / weight).backward()
    _wait(device)
    seconds = time.perf_counter() - began
    for parameter in objective.parameters():
        parameter.grad = None
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
