"""A first run tries ways in its first steps; killed there and resumed, or made again, it is the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafit import pipeline
from lorafit.trainer.loop import Trainer
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import make_recipe

STEPS, TRIED = 40, 4


class Killed(BaseException):
    """As if the process was killed here."""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    make_base(tmp_path / "base")
    return make_recipe(
        tmp_path,
        model={"attention": "auto"},
        adapter={"dropout": 0.3},
        training={"max_steps": STEPS, "micro_batch_tokens": "auto", "gradient_checkpointing": "auto"},
        evaluation={"every_steps": 3},
    )


def train(recipe: Path, name: str, **options: Any) -> Path:
    return pipeline.train(recipe, output=recipe.parent / name, **options).path


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int, edges: bool) -> None:
    """Ends the process within that step, or behind it before its checkpoint is written."""
    name = "_finish_edge" if edges else "_take_step"
    inner = getattr(Trainer, name)

    def killed(self: Trainer, state: Any) -> None:
        if state.step == step - (not edges):
            raise Killed
        inner(self, state)

    monkeypatch.setattr(Trainer, name, killed)


def log_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def plan_of(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "plan.json").read_text())
    return values


def same(run: Path, other: Path) -> bool:
    names = (
        "adapter/adapter_model.safetensors", f"checkpoints/step-{STEPS:06d}/optimizer.safetensors", "card.json",
    )  # fmt: skip
    return log_of(run) == log_of(other) and all((run / n).read_bytes() == (other / n).read_bytes() for n in names)


@pytest.mark.parametrize(("step", "edges"), [(1, False), (4, True), (5, False)])
def test_killed_in_the_trying_phase_and_resumed_is_the_unkilled_run(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, step: int, edges: bool
) -> None:
    """The unkilled run: by the plan that the killed one wrote down, in one go."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, step, edges)
        train(recipe, "killed")
    assert plan_of(recipe.parent / "killed")["is_settled"] is (edges or step > TRIED)
    killed = train(recipe, "killed", resume=True)
    plan = plan_of(killed)
    assert plan["is_settled"] and len(plan["first_steps"]) == TRIED and len(plan["measured"]["tried"]) == 2
    assert same(train(recipe, "whole", plan_file=killed / "plan.json"), killed)


def test_what_was_settled_is_kept_where_a_resume_goes_back_behind_it(recipe: Path) -> None:
    run = train(recipe, "run", overrides=["checkpoints.keep_last=100"])
    plan = plan_of(run)
    planted = {**plan, "micro_batch_tokens": plan["micro_batch_tokens"] + 1}  # no clock would choose that
    (run / "plan.json").write_text(json.dumps(planted))
    train(recipe, "run", overrides=["checkpoints.keep_last=100"], resume_from=2)
    again = plan_of(run)
    assert (again["micro_batch_tokens"], again["is_settled"]) == (planted["micro_batch_tokens"], True)
    assert again["measured"]["tried"] == plan["measured"]["tried"]


def test_a_second_run_takes_what_the_first_found_and_is_the_same_run(recipe: Path) -> None:
    first = train(recipe, "first")
    second = train(recipe, "second")
    plans = [plan_of(run) for run in (first, second)]
    assert [plan["source"] for plan in plans] == ["rehearsal", "cache"]
    assert plans[0]["measured"]["tried"] == plans[1]["measured"]["tried"]  # and not measured anew
    assert plans[0]["first_steps"] == plans[1]["first_steps"] and same(first, second)


def test_a_short_run_tries_nothing(recipe: Path) -> None:
    plan = plan_of(train(recipe, "short", overrides=["training.max_steps=3"]))
    assert (plan["first_steps"], plan["is_settled"]) == ([], True)


def test_the_loop_cuts_and_loses_as_the_plan_says(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a card measured and has room for goes with the plan, into this run and into its resume."""
    seen: list[tuple[int, int | None, int]] = []
    inner = Trainer.build_micro_batches

    def noted(self: Trainer, step: int, token_budget: int) -> Any:
        batches = inner(self, step, token_budget)
        seen.append((self.cutter.cost_tokens, self.executor.objective.loss_chunk_bytes, len(batches)))
        return batches

    monkeypatch.setattr(Trainer, "build_micro_batches", noted)
    asked = {"overrides": ["training.max_steps=3", "training.batch_size=8", "checkpoints.every_steps=1"]}
    first = train(recipe, "first", **asked)
    told = {**plan_of(first), "micro_batch_tokens": 100_000, "micro_batch_cost_tokens": 9000, "loss_chunk_bytes": 4096}
    (recipe.parent / "told.json").write_text(json.dumps(told))
    assert {found[:2] for found in seen} == {(96, None)}
    seen.clear()
    second = train(recipe, "second", plan_file=recipe.parent / "told.json", **asked)
    train(recipe, "second", resume_from=2, **asked)
    assert len(seen) > 3 and set(seen) == {(9000, 4096, 1)}  # all rows of a step at once: a second start is too dear
    assert plan_of(second)["micro_batch_cost_tokens"] == 9000
