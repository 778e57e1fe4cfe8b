"""The loop trains what a plain transformers + PEFT loop trains, however a step is cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorafit.data.batch import StepRows
from lorafit.trainer.state import TrainState
from tests.support.tiny_run import Job, Rows, TinyPlan


def plain_losses(job: Job, steps: int) -> tuple[list[float], list[float], torch.nn.Module]:
    """transformers and PEFT alone: the model's own loss from full logits, every row alone, torch's AdamW and clipping.

    A step's loss is the mean over all its trained tokens.
    """
    trainer = job.trainer()
    model = copy.deepcopy(job.model).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    step_rows = StepRows(job.rows, job.seed, job.batch_size)
    losses, norms = [], []
    for step in range(1, steps + 1):
        _, rows = step_rows.rows(step)
        labels_of = {row: labels(job.rows, row) for row in rows}
        total = sum(sum(label != -100 for label in labels_of[row][1:]) for row in rows)
        loss_sum = 0.0
        for row in rows:
            ids, wanted = torch.tensor([job.rows.ids[row]]), torch.tensor([labels_of[row]])
            count = int((wanted[:, 1:] != -100).sum())
            outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=wanted)
            (outputs.loss * count / total).backward()
            loss_sum += float(outputs.loss.detach()) * count
        losses.append(loss_sum / total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = trainer.update.learning_rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, model


def labels(rows: Rows, row: int) -> list[int]:
    return [token if kept else -100 for token, kept in zip(rows.ids[row], rows.trained[row], strict=True)]


def test_equals_a_plain_transformers_loop(job: Callable[..., Job]) -> None:
    ours = job(rows=Rows(64), plan=TinyPlan(total_steps=8, save_every_steps=100), learning_rate=2e-2)
    losses, norms, plain = plain_losses(ours, 8)
    ours.trainer().fit(TrainState())
    lines = ours.lines()
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-4)
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-3)
    assert losses[-1] < losses[0] - 0.05  # it has learnt something, so that the comparison means something
    for mine, theirs in zip(ours.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-4)


def test_cuts_do_not_change_the_result(job: Callable[..., Job]) -> None:
    """16 x 1, about 4 x 4, and 1 x 16 rows a micro-batch."""
    logs = []
    for name, budget in (("16x1", 1), ("4x4", 160), ("1x16", 100_000)):
        one = job(name, budget=budget, rows=Rows(48), plan=TinyPlan(total_steps=6, save_every_steps=100))
        trainer = one.trainer()
        counts = [len(trainer.build_micro_batches(step, budget)) for step in (1, 2)]
        assert {"16x1": counts[0] == 16, "4x4": 3 <= counts[0] <= 6, "1x16": counts[0] <= 4}[name]
        trainer.fit(TrainState())
        logs.append(one.lines())
    for log in logs[1:]:
        for field in ("loss", "grad_norm"):
            assert [line[field] for line in log] == pytest.approx([line[field] for line in logs[0]], rel=1e-5)


def test_nf4_cuts_agree_to_the_rounding_of_bf16(job: Callable[..., Job]) -> None:
    losses = []
    for name, budget in (("16x1", 1), ("1x16", 100_000)):
        one = job(
            name,
            budget=budget,
            quantized=True,
            autocast_dtype=torch.bfloat16,
            rows=Rows(32),
            plan=TinyPlan(total_steps=4, save_every_steps=100),
        )
        one.trainer().fit(TrainState())
        losses.append([line["loss"] for line in one.lines()])
    difference = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
    print(f"NF4, bf16: 16x1 and 1x16 differ by {difference:.2e}")
    assert difference < 1e-2


@pytest.mark.parametrize("kind", ["paged_adamw_8bit", "lion_32bit", "sgd", "adafactor"])
def test_other_optimizers_learn_too(job: Callable[..., Job], kind: str) -> None:
    rate = {"sgd": 1.0, "lion_32bit": 2e-3}.get(kind, 2e-2)
    one = job(optimizer={"kind": kind}, learning_rate=rate, plan=TinyPlan(total_steps=24, save_every_steps=100))
    one.trainer().fit(TrainState())
    lines = one.lines()
    assert sum(line["loss"] for line in lines[-3:]) / 3 < lines[0]["loss"] - 0.02


def test_log_lines_hold_what_was_promised(job: Callable[..., Job]) -> None:
    one = job(plan=TinyPlan(total_steps=3, save_every_steps=100))
    result = one.trainer().fit(TrainState())
    lines: list[dict[str, Any]] = one.lines()
    assert [set(line) for line in lines] == [
        {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "seconds"}
    ] * 3
    assert lines[-1]["epoch"] == 1.0
    assert sum(line["tokens"] for line in lines) == sum(one.rows.lengths) == result.tokens
    assert sum(line["trained_tokens"] for line in lines) == sum(one.rows.trained_tokens) == result.trained_tokens
