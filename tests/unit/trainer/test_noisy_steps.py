"""Noise on embeddings is in the steps of a run alone, and a resumed run draws the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lorafit.ops.embedding_noise import NOISE
from lorafit.trainer.held_out import Cadence, HeldOut
from lorafit.trainer.state import TrainState
from tests.support.tiny_run import Job, Rows, TinyPlan

PLAN = TinyPlan(total_steps=6, save_every_steps=2, evaluate_every_steps=2)


def train(job: Job, state: TrainState, trainer: Any, cadence: Cadence = PLAN) -> list[tuple[bool, bool]]:
    """Trains, and at each evaluation looks whether a batch has noise, and whether the same loss comes twice."""
    seen = []

    def evaluate() -> dict[str, float]:
        batch = trainer.cutter.collate([[0], [1]])
        with torch.no_grad():
            first, second = (float(job.objective.eval()(batch).loss_sum) for _ in range(2))
        seen.append((NOISE in batch.tensors, first == second))
        return {"loss": first}

    trainer.cadence, trainer.held_out = cadence, HeldOut(evaluate)
    trainer.fit(state)
    return seen


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_run_learns_with_noise_evaluates_without_and_resumes_bit_for_bit(
    job: Callable[..., Job], at_once: int
) -> None:
    whole, plain, parts = (
        job(name, rows=Rows(40), plan=PLAN, embedding_noise=alpha, at_once=at_once, packing=at_once == 1)
        for name, alpha in (("whole", 5.0), ("plain", None), ("parts", 5.0))
    )
    assert train(whole, TrainState(), whole.trainer()) == [(False, True)] * 3
    train(plain, TrainState(), plain.trainer())
    noisy, quiet = ([line["loss"] for line in each.lines() if "loss" in line] for each in (whole, plain))
    assert all(one != other for one, other in zip(noisy, quiet, strict=True))
    train(parts, TrainState(), parts.trainer(), replace(PLAN, total_steps=4))
    resumed, state = parts.resume()
    train(parts, state, resumed)
    assert parts.files(6) == whole.files(6)
