"""One optimizer step: micro-batches forward and backward, summed over ranks, divided once; then the update.

    rows of the step --cut_step--> micro-batches --dealt to ranks--> forward, backward (no communication)
    weight = labels of the whole step, over all ranks, counted before the first backward
    gradient = sum over micro-batches and ranks of d(loss_sum / weight)

Each rank runs backward on its own micro-batches, however many, without DDP's averaging; one flat buffer is summed at
the end. So nothing is divided by ranks or by accumulation steps, and there is nothing to undo.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorafit.errors import NumericsError, row_place
from lorafit.trainer.profile import NO_PROFILE, NoProfile

if TYPE_CHECKING:
    from lorafit.contracts import Batch, Examples
    from lorafit.trainer.threaded_micro_batches import Abreast

_NAMED_ROWS = 3


@dataclass(frozen=True, slots=True)
class StepFigures:
    """What the backward passes of one step gave, over all ranks.

    Attributes:
        loss: Mean cross-entropy over the labels, in nats.
        tokens: Real tokens.
        padded_tokens: Those and padding.
        trained_tokens: Labels.
    """

    loss: float
    tokens: int
    padded_tokens: int
    trained_tokens: int


def sum_over_ranks(values: Sequence[float], accelerator: Any) -> list[float]:
    """The sums of each rank's values, on every rank."""
    if accelerator.num_processes == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    summed: list[float] = accelerator.reduce(total, "sum").tolist()
    return summed


def accumulate_gradients(
    objective: torch.nn.Module,
    batches: Sequence[Batch],
    accelerator: Any,
    scaler: torch.amp.GradScaler | None,
    after_each: Callable[[], None],
    profile: NoProfile = NO_PROFILE,
    abreast: Abreast | None = None,
) -> tuple[StepFigures, list[float]]:
    """Leaves this rank's share of the step's gradient in `.grad`; the host waits for the device once, at the end.

    Args:
        objective: As `Accelerator.prepare` gave it.
        batches: This rank's micro-batches, on the CPU; may be none.
        scaler: fp16's loss scale.
        after_each: Called after each micro-batch; what it raises ends the step.
        profile: Told when forward and backward begin and end.
        abreast: Takes several micro-batches at once; None: one by one.

    Returns:
        The step's figures, and the loss sum of each of this rank's micro-batches.
    """
    sizes = [(batch.weight, batch.tokens, batch.padded_tokens) for batch in batches] or [(0, 0, 0)]
    weight, tokens, padded = sum_over_ranks([float(sum(column)) for column in zip(*sizes, strict=True)], accelerator)
    losses = [] if abreast is None else abreast.accumulate(objective, batches, weight, after_each)
    for batch in batches if abreast is None else ():
        with accelerator.no_sync(objective):
            with profile.phase("forward"):
                loss_sum, _, _ = objective(batch.to(accelerator.device))
                loss = loss_sum / weight
            with profile.phase("backward"):
                accelerator.backward(loss if scaler is None else scaler.scale(loss))
        losses.append(loss_sum.detach())
        after_each()
    sums: list[float] = torch.stack(losses).double().tolist() if losses else []
    (loss_total,) = sum_over_ranks([sum(sums)], accelerator)
    return StepFigures(loss_total / weight, int(tokens), int(padded), int(weight)), sums


@torch.no_grad()
def sum_gradients(parameters: Sequence[torch.nn.Parameter], accelerator: Any) -> None:
    """Sums gradients over ranks in one flat buffer; a rank without a micro-batch adds zeros."""
    if accelerator.num_processes == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    summed = accelerator.reduce(flat, "sum")
    for parameter, part in zip(parameters, summed.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


def gradient_norm(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """Euclidean norm over all gradients, a scalar on their device; may be Inf or NaN."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(parameters: Sequence[torch.nn.Parameter], norm: torch.Tensor, max_norm: float | None) -> None:
    """Scales gradients of that norm down to `max_norm`; None: leaves them."""
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def update_parameters(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    scaler: torch.amp.GradScaler | None,
    *,
    norm: torch.Tensor,
    max_norm: float | None,
    learning_rate: float,
) -> None:
    """Clips gradients of that norm and takes the optimizer's step; the scaler skips it where fp16 overflowed."""
    clip_gradients(parameters, norm, max_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


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
