"""A run may stop by what it answers: those metrics are measured while training, and change nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafit import pipeline
from lorafit.errors import CheckpointError
from lorafit.files.atomic import read_object
from lorafit.plan.render import plan_table
from lorafit.run.trained import Trained
from tests.support.option_world import evaluation_lines, step_lines
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import make_recipe

ANSWERED = {"every_steps": 1, "during": ["rouge"], "final": ["rouge"], "answered_rows": 3, "max_new_tokens": 5}
STOPPING = {"metric": "rouge", "patience": 2, "min_delta": 0.9}


def train(folder: Path, **evaluation: Any) -> Trained:
    folder.mkdir()
    make_base(folder / "base")
    return pipeline.train(make_recipe(folder, evaluation=evaluation, adapter={"dropout": 0.2}))


def test_rouge_stops_a_run_and_chooses_its_adapter(tmp_path: Path) -> None:
    """No ROUGE is better by 0.9, so that the first evaluation stays the best, and two more end the run."""
    trained = train(tmp_path / "a", **ANSWERED, early_stopping=STOPPING, num_beams=2)
    found = [line["evaluation"] for line in evaluation_lines(trained.run)]
    assert len(found) == 3
    assert {"loss", "rougeL", "rouge1"} < found[0].keys()
    best = read_object(trained.run.best)
    assert (best["metric"], best["step"], best["value"]) == ("rouge", 1, found[0]["rougeL"])
    plan = trained.plan
    assert plan is not None
    assert (plan.answered_rows, plan.answer_tokens, plan.answer_beams) == (3, 3 * 5, 2)
    assert "3 rows each time, at most 15 tokens in each of 2 beams" in plan_table(plan).columns[1].cells


def test_answers_change_nothing_of_the_training(tmp_path: Path) -> None:
    runs = [train(tmp_path / "a", **ANSWERED), train(tmp_path / "b", every_steps=1)]
    losses = [[line["loss"] for line in step_lines(trained.run)] for trained in runs]
    assert losses[0] == losses[1]


def test_what_stops_a_run_is_the_same_when_it_goes_on(tmp_path: Path) -> None:
    train(tmp_path / "a", **ANSWERED, early_stopping=STOPPING)
    recipe, longer = tmp_path / "a" / "recipe.yaml", ["evaluation.max_new_tokens=6"]
    with pytest.raises(CheckpointError, match=r"evaluation\.max_new_tokens"):
        pipeline.train(recipe, overrides=longer, resume=True)
    train(tmp_path / "b", **ANSWERED)
    pipeline.train(tmp_path / "b" / "recipe.yaml", overrides=longer, resume=True)  # decides what is shown alone
