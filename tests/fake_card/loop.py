"""Steps of the real training loop on the pretended card: where the host waits for it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lorafit.contracts import Silent
from lorafit.data.batch import StepRows
from lorafit.data.packing import Cutter
from lorafit.plan import ResolvedPlan
from lorafit.trainer.checkpoint import Environment, Snapshot
from lorafit.trainer.journal import Journal, MetricsLog
from lorafit.trainer.loop import Trainer
from lorafit.trainer.state import TrainState
from tests.fake_card.step import CARD, CardStep, Observer
from tests.support.tiny_run import Rows, TinyPlan

ROWS_A_STEP = 16


def answer(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each question's second step: waits by place, and the micro-batches it was cut into."""
    return [count_waits(**question) for question in questions]


def count_waits(recipe: str, overrides: list[str], *, micro_batch_tokens: int, packing: bool = False) -> dict[str, Any]:
    """One step of rows of many lengths, behind a first one that makes the optimizer's state."""
    step = CardStep(Path(recipe), overrides, model=None, layers=2, row_tokens=64)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(step, Path(folder), micro_batch_tokens, packing)
        state, observer = TrainState(), Observer(holds_documents=packing)
        with trainer.journal.tracking(TinyPlan.total_steps, 0, CARD):
            for watching in (Observer(holds_documents=packing), observer):
                with step.running(watching), watching:
                    trainer._take_step(state)
        batches = trainer.build_micro_batches(state.step, micro_batch_tokens)
    parameters = len(step.executor.parameters)
    return {"waits": observer.waits, "micro-batches": len(batches), "parameters": parameters}


def build_trainer(step: CardStep, folder: Path, micro_batch_tokens: int, packing: bool) -> Trainer:
    """The loop around a step's executor and update; nothing is ever saved."""
    shape, rows = step.step, Rows(ROWS_A_STEP)
    plan = ResolvedPlan(
        micro_batch_tokens, 64, shape.attention, False, shape.dtype, shape.compute_dtype, "cuda", 1, "recipe"
    )
    snapshot = Snapshot(step.update, lambda folder: None, lambda folder: None, plan, Environment.here("cuda", 1))
    return Trainer(
        step.executor,
        step.update,
        StepRows(rows, 0, ROWS_A_STEP),
        Cutter(rows, shape.task, 0, packing),
        TinyPlan(),
        store=None,
        snapshot=snapshot,
        journal=Journal(Silent(), MetricsLog(folder / "metrics.jsonl", Silent())),
    )
