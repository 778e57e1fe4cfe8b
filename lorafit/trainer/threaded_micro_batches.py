"""The executor that runs several micro-batches of a step at once on a CPU, each on a core of its own.

The products of a small model are too small to be worth sharing: two cores do them 1.4 times as fast as one. The sum is
the same: each thread computes its micro-batch's gradient for itself, and the gradients are added in a fixed order, the
most tokens first, whichever is done first. That is the order in which they are begun, too: the last ones are short.

Random numbers are a micro-batch's own as well: it drops by a generator whose seed was drawn before any thread began.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Self

import torch
from torch import nn

from lorafit.contracts import Batch
from lorafit.objective import Objective
from lorafit.ops.dropout import draw_seed, drawing_from, drop
from lorafit.ops.isolation import in_mode, without_training
from lorafit.ops.rng import capture_rng
from lorafit.trainer.executor import Executor, no_check

Gradients = tuple[torch.Tensor | None, ...]
_MUTABLE_ROTARY = ("dynamic", "longrope")  # their frequencies change with the longest row so far


class InThreads(Executor):
    """Threads that each take one micro-batch at a time.

    Within its context the model's dropout layers draw from the generator of the micro-batch that their thread runs.

    Args:
        objective: On the CPU; see `may_run_in_threads`.
        count: Threads; one core each.
    """

    def __init__(self, objective: Objective, count: int) -> None:
        super().__init__(objective, torch.device("cpu"))
        self.count = count
        self._pool: ThreadPoolExecutor | None = None
        dropouts = (module for module in objective.modules() if type(module) is nn.Dropout)
        self._dropouts = [module for module in dropouts if "forward" not in vars(module)]  # else somebody's own

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="lorafit-micro-batch")
        for dropout in self._dropouts:
            vars(dropout)["forward"] = types.MethodType(_drop, dropout)
        return self

    def __exit__(self, *exc: object) -> None:
        for dropout in self._dropouts:
            vars(dropout).pop("forward", None)
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def accumulate(
        self, batches: Sequence[Batch], weight: float, after_each: Callable[[], None] = no_check
    ) -> list[torch.Tensor]:
        assert self._pool is not None, "outside of its context"
        threads = torch.get_num_threads()
        order = sorted(range(len(batches)), key=lambda number: -batches[number].padded_tokens)
        seeds = [draw_seed() for _ in order]  # all of them first: checkpointing sets the generator in its thread
        futures: list[Future[tuple[torch.Tensor, Gradients]]] = [
            self._pool.submit(self._differentiate, batches[number], weight, seed)
            for number, seed in zip(order, seeds, strict=True)
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

    def pool(self, batches: Sequence[Batch], after_each: Callable[[], None] = no_check) -> list[torch.Tensor]:
        assert self._pool is not None, "outside of its context"
        threads, found = torch.get_num_threads(), []
        with without_training(self.objective), self.profile.phase("forward"):
            futures = [self._pool.submit(self._pool_one, batch) for batch in batches]
            try:
                for future in futures:
                    found.append(future.result())
                    after_each()
            finally:
                for future in futures:
                    future.cancel()
                wait(futures)
                torch.set_num_threads(threads)
        return found

    def _pool_one(self, batch: Batch) -> torch.Tensor:
        torch.set_num_threads(1)
        return self.objective.pool(batch)

    def _differentiate(self, batch: Batch, weight: float, seed: int) -> tuple[torch.Tensor, Gradients]:
        torch.set_num_threads(1)
        with drawing_from(seed):
            loss_sum = self.objective(batch).loss_sum
        loss = self.scaler.scale(loss_sum / weight)
        return loss_sum.detach(), torch.autograd.grad(loss, self.unfrozen, allow_unused=True)

    @torch.no_grad()
    def _add(self, gradients: Gradients) -> None:
        for parameter, gradient in zip(self.unfrozen, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)


def _drop(self: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    """The forward of a dropout layer among threads."""
    return drop(x, self.p) if self.training and self.p > 0 else x


def run_at_once(executor: Executor, count: int) -> Executor:
    """The executor, or one that runs so many micro-batches at once over the same objective."""
    if count == 1:
        return executor
    threads = InThreads(executor.objective, count)
    threads.scaler = executor.scaler
    return threads


def may_run_in_threads(executor: Executor, batch: Batch, *, checkpointing: bool) -> bool:
    """Whether threads would not disturb each other, and a run would give the same bits again.

    They would where layers change in a forward, or draw random numbers from a generator that all threads share. What
    is drawn is seen, not told by what layers are called: one forward in training mode is run, and the generators are
    looked at. A dropout that draws by itself, such as attention's, is found so, whoever computes it.

    Args:
        executor: Of the run.
        batch: A short one.
        checkpointing: A second forward would draw again, and not the same: then nothing may be dropped at all.
    """
    objective = executor.objective
    if executor.device.type != "cpu" or executor.ranks > 1 or objective.exact:
        return False
    rotary = getattr(objective.base.config, "rope_parameters", None) or {}
    if str(rotary.get("rope_type", "default")) in _MUTABLE_ROTARY:
        return False
    with in_mode(objective, training=True), InThreads(objective, 1), drawing_from(0) as own:
        shared_before, own_before = capture_rng(), repr(own.bit_generator.state)
        objective(batch)
        draws_shared, draws_own = capture_rng() != shared_before, repr(own.bit_generator.state) != own_before
    return not draws_shared and not (draws_own and checkpointing)
