"""What is done between steps: before a step, in its gradient, behind its update; once a step, however it is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorafit.ops.step_hook import StepHook
from lorafit.trainer.state import TrainState
from lorafit.trainer.step import accumulate_gradients
from lorafit.trainer.threaded_micro_batches import run_at_once
from tests.support.tiny_run import Job, Pulling, TinyPlan

HOOKED = {"hooks": lambda model: [StepHook(), Pulling(model)], "plan": TinyPlan(total_steps=4, save_every_steps=2)}


def gradients(trainer: Any, at_once: int, hooks: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    trainer.executor.objective.train()
    trainer.update.optimizer.zero_grad(set_to_none=True)
    with run_at_once(trainer.executor, at_once) as executor:
        figures, _ = accumulate_gradients(
            executor, trainer.build_micro_batches(2, trainer.plan.later.micro_batch_tokens), hooks=hooks
        )
    trainer.update.gradient_norm()  # the loss scale is out of them
    trainer.update.scaler.update()
    return figures, {name: p.grad.clone() for name, p in trainer.update.named if p.grad is not None}


@pytest.mark.parametrize(
    ("budget", "at_once", "dtype"), [(40, 1, None), (400, 1, None), (40, 2, None), (40, 1, torch.float16)]
)
def test_a_penalty_is_added_once_a_step_and_is_no_part_of_the_loss(
    job: Callable[..., Job], budget: int, at_once: int, dtype: torch.dtype | None
) -> None:
    """Of B's entries b: 0.1 b^2, whose gradient is 0.2 b."""
    trainer = job(budget=budget, at_once=at_once, autocast_dtype=dtype).trainer()
    hook = Pulling(trainer.executor.objective.model)
    figures, plain = gradients(trainer, at_once, [])
    found_figures, found = gradients(trainer, at_once, [hook])
    assert found_figures.loss == figures.loss
    pulled = {id(parameter): parameter.detach() for _, parameter in hook.pulled}
    assert len(pulled) == 7
    parameters = dict(trainer.update.named)
    for name, gradient in plain.items():
        expected = gradient + 0.2 * pulled.get(id(parameters[name]), torch.zeros(()))
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)


def test_hooks_are_called_around_each_step_and_resumed_to_the_bit(job: Callable[..., Job]) -> None:
    whole, parts = job("whole", dropout=0.2, **HOOKED), job("parts", dropout=0.2, **HOOKED)
    trainer = whole.trainer()
    trainer.fit(TrainState())
    assert trainer.update.hooks[1].steps == [-1, 1, -2, 2, -3, 3, -4, 4]
    parts.trainer().fit(TrainState())
    trainer, state = parts.resume(2)
    assert trainer.update.hooks[1].steps == [-1, 1, -2, 2]
    trainer.fit(state)
    assert "hooks.safetensors" in parts.files(4) and parts.files(4) == whole.files(4)
    assert state.hooks == [{}, {"steps": [-1, 1, -2, 2, -3, 3, -4, 4]}]


def test_a_step_that_is_repeated_with_less_memory_is_begun_anew(job: Callable[..., Job]) -> None:
    """The run is the one that was planned with the smaller budget."""
    small, ran_out = (job(name, dropout=0.2, budget=budget, **HOOKED) for name, budget in (("small", 80), ("big", 160)))
    small.trainer().fit(TrainState())
    trainer = ran_out.trainer()
    inner, left = trainer.executor.objective.forward, [1]

    def forward(batch: Any) -> Any:
        if left and left.pop():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(batch)

    trainer.executor.objective.forward = forward
    trainer.fit(TrainState())
    assert trainer.update.hooks[1].steps == [-1, -1, 1, -2, 2, -3, 3, -4, 4]
    assert ran_out.files(4) == small.files(4)


@pytest.mark.parametrize("at_once", [1, 2])
def test_what_is_frozen_takes_no_gradient_no_state_and_no_decay(job: Callable[..., Job], at_once: int) -> None:
    """Odd steps freeze the first layer; even ones train it."""
    one = job(at_once=at_once, optimizer={"kind": "adamw", "weight_decay": 0.5}, **HOOKED)
    trainer = one.trainer()
    lower = [p for name, p in trainer.update.named if ".layers.0." in name]
    before, grads = [p.detach().clone() for p in lower], []
    inner = trainer.update.hooks[1].after_optimizer_step

    def note(step: int) -> None:
        grads.append([p.grad is not None for p in lower])
        inner(step)

    trainer.update.hooks[1].after_optimizer_step = note
    state = TrainState()
    with trainer._running, trainer.journal.tracking(4, 0, trainer.executor.device):
        trainer._take_step(state)
        assert grads == [[False] * len(lower)]
        assert all(torch.equal(old, p) for old, p in zip(before, lower, strict=True))
        assert not any(p in trainer.update.optimizer.state for p in lower)
        trainer._take_step(state)
    assert grads[1] == [True] * len(lower)
    assert not any(torch.equal(old, p) for old, p in zip(before, lower, strict=True))
