"""One optimizer step: micro-batches forward and backward, summed over ranks, divided once; then the update.

rows of the step --cut_step--> micro-batches --dealt to ranks--> forward, backward (by an `Executor`)
weight = labels of the whole step, over all ranks, counted before the first backward
pooled = what the losses of a task's rows need of all the others, as KTO's do: summed likewise before the first backward
gradient = sum over micro-batches and ranks of d(loss_sum / weight), and of the hooks' penalties once
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lorafit.contracts import Batch, Examples
from lorafit.errors import NumericsError, row_place
from lorafit.kinds.optimizers import set_rates
from lorafit.ops.process_memory import is_out_of_memory
from lorafit.ops.step_hook import StepHook
from lorafit.trainer.executor import Executor, no_check

_NAMED_ROWS = 3


@dataclass(frozen=True, slots=True)
class StepFigures:
    """What the backward passes of one step gave, over all ranks.

    Attributes:
        loss: Mean over what the task weighs, e.g. nats a trained token.
        tokens: Real tokens.
        padded_tokens: Those and padding.
        trained_tokens: Those that carry loss.
    """

    loss: float
    tokens: int
    padded_tokens: int
    trained_tokens: int


def accumulate_gradients(
    executor: Executor,
    batches: Sequence[Batch],
    after_each: Callable[[], None] = no_check,
    hooks: Sequence[StepHook] = (),
) -> tuple[StepFigures, list[float]]:
    """Leaves this rank's share of the step's gradient in `.grad`; the host waits for the device once, at the end, and
    once before where the task pools over the step.

    Ranks meet before and behind it, and then tell each other too whether memory ran out, so that none waits in vain.

    Args:
        executor: Runs the micro-batches.
        batches: This rank's micro-batches, on the CPU; may be none.
        after_each: Called after each micro-batch; what it raises ends the step.
        hooks: Whose penalties belong to the gradient; no figure tells of them.

    Returns:
        The step's figures, and the loss sum of each of this rank's micro-batches.

    Raises:
        MemoryError: On every rank, where memory of a device or host ran out on one; nothing in `.grad` is of use.
    """
    sizes = [_sizes(batch) for batch in batches] or [(0, 0, 0, 0)]
    weight, tokens, padded, trained = executor.sum([float(sum(column)) for column in zip(*sizes, strict=True)])
    if count := executor.objective.task.pools:
        _, pooled = _run_together(executor, lambda: executor.pool(batches, after_each), [0.0] * count)
        batches = [_with_pooled(batch, pooled) for batch in batches]

    def run() -> Sequence[torch.Tensor]:
        losses = executor.accumulate(batches, weight, after_each)
        for penalty in (hook.penalty() for hook in hooks) if executor.rank == 0 else ():  # ranks add their gradients
            if penalty is not None:
                executor.scaler.scale(penalty).backward()  # type: ignore[no-untyped-call]
        return losses

    sums, (loss_total,) = _run_together(executor, run, [0.0])
    return StepFigures(loss_total / weight, int(tokens), int(padded), int(trained)), [sum_ for (sum_,) in sums]


def _run_together(
    executor: Executor, run: Callable[[], Sequence[torch.Tensor]], nothing: Sequence[float]
) -> tuple[list[list[float]], list[float]]:
    """What `run` gives for each of this rank's micro-batches, and the sums of it over all ranks.

    Args:
        executor: Joins the ranks.
        run: Gives a tensor for each micro-batch, all of one shape.
        nothing: The sums of no micro-batch.

    Raises:
        MemoryError: On every rank, where memory ran out on one.
    """
    found: list[list[float]] = []
    ran_out = False
    try:
        tensors = run()
        found = torch.stack(list(tensors)).double().view(len(tensors), -1).tolist() if tensors else []
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        ran_out = True
    # Outside of the except block: the traceback holds the activations.
    own = [sum(values) for values in zip(*found, strict=True)] or nothing
    *summed, ranks_out = executor.sum([*own, float(ran_out)])
    if ranks_out:
        raise MemoryError(f"on {ranks_out:.0f} of {executor.ranks} ranks")
    return found, summed


def _with_pooled(batch: Batch, pooled: Sequence[float]) -> Batch:
    """The batch with what the task pooled over its whole step."""
    return replace(batch, tensors={**batch.tensors, "pooled": torch.tensor(pooled, dtype=torch.float64)})


def _sizes(batch: Batch) -> tuple[int, int, int, int]:
    trained = batch.weight if batch.trained_tokens is None else batch.trained_tokens
    return batch.weight, batch.tokens, batch.padded_tokens, trained


@dataclass(frozen=True)
class Update:
    """How the gradients of a step change the weights: norm, clipping, the optimizer, and what is done between steps.

    Attributes:
        optimizer: Over the trained parameters.
        named: Those, with their names.
        learning_rate_at: Learning rate of a step, from 1; a pure function.
        scaler: fp16's loss scale, as the executor has it.
        max_grad_norm: Gradients are scaled down to this norm; None: no clipping.
        hooks: What is done between steps: by the adapter's method, by unfreezing.
    """

    optimizer: torch.optim.Optimizer
    named: Sequence[tuple[str, torch.nn.Parameter]]
    learning_rate_at: Callable[[int], float]
    scaler: torch.amp.GradScaler
    max_grad_norm: float | None = 1.0
    hooks: Sequence[StepHook] = ()

    def gradient_norm(self) -> torch.Tensor:
        """Euclidean norm over all gradients, the loss scale taken out of them; a scalar, may be Inf or NaN."""
        self.scaler.unscale_(self.optimizer)
        return torch.nn.utils.get_total_norm([p.grad for _, p in self.named if p.grad is not None])

    def apply(self, step: int, norm: torch.Tensor, rate_factor: float = 1.0) -> float:
        """Clips gradients of that norm and takes the optimizer's step; fp16's scaler skips it where they overflowed.

        Args:
            step: From 1.
            norm: Of the gradients.
            rate_factor: What evaluations have made of the learning rate.

        Returns:
            The learning rate, before a group's own factor.
        """
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_([p for _, p in self.named], self.max_grad_norm, norm)
        learning_rate = self.learning_rate_at(step) * rate_factor
        set_rates(self.optimizer, learning_rate)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for hook in self.hooks:
            hook.after_optimizer_step(step)
        return learning_rate


def check_loss(
    step: int, figures: StepFigures, sums: Sequence[float], batches: Sequence[Batch], examples: Examples
) -> None:
    """Raises NumericsError that names the rows where the loss is not finite."""
    if math.isfinite(figures.loss):
        return
    rows = [row for value, batch in zip(sums, batches, strict=True) if not math.isfinite(value) for row in batch.rows]
    raise NumericsError(
        f"step {step}: non-finite loss ({figures.loss}){_in_rows(rows, examples)}; no optimizer step was taken",
        todo="look at those rows, lower training.learning_rate, or use model.dtype bf16",
    )


def check_gradients(
    step: int,
    norm: float,
    named: Sequence[tuple[str, torch.nn.Parameter]],
    batches: Sequence[Batch],
    examples: Examples,
) -> None:
    """Raises NumericsError that names the first parameter whose gradient is not finite, and the step's rows."""
    if math.isfinite(norm):
        return
    bad = [name for name, p in named if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    where = f"{bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else "") if bad else "the total norm"
    rows = [row for batch in batches for row in batch.rows]
    raise NumericsError(
        f"step {step}: non-finite gradient ({norm}) in {where}{_in_rows(rows, examples)}; no optimizer step was taken",
        todo="lower training.learning_rate, or use model.dtype bf16",
    )


def check_metrics(step: int, values: Mapping[str, float]) -> None:
    """Raises NumericsError that names the first held-out metric that is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise NumericsError(
                f"step {step}: evaluation gave a non-finite {name} ({value})", todo="lower training.learning_rate"
            )


def _in_rows(rows: Sequence[int], examples: Examples) -> str:
    if not rows:
        return " on another rank"
    named = ", ".join(
        row_place(example.file, example.line) for example in (examples[row] for row in rows[:_NAMED_ROWS])
    )
    more = f" and {len(rows) - _NAMED_ROWS} more" if len(rows) > _NAMED_ROWS else ""
    return f" in the micro-batch of rows {named}{more}"
