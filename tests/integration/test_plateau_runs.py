"""What a recipe's `on_plateau` leads to in a run, and what it makes of a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafit import pipeline
from lorafit.errors import CheckpointError
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import make_recipe
from tests.support.world import stop_after

FALLING = {"patience": 1, "min_delta": 9.0, "at_most": 1, "factor": 0.5}


def recipe(folder: Path) -> Path:
    make_base(folder / "base")
    evaluation = {"every_steps": 1, "on_plateau": FALLING}
    return make_recipe(folder, evaluation=evaluation, checkpoints={"keep_last": 9})


def test_a_resume_evaluates_as_the_run_did(tmp_path: Path) -> None:
    file, run = recipe(tmp_path), tmp_path / "run"
    pipeline.train(file)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "rate_factor" in line] == [2]
    stop_after(run, 2)
    with pytest.raises(CheckpointError, match=r"not be the same run.*evaluation\.every_steps"):
        pipeline.train(file, resume=True, overrides=["evaluation.every_steps=2"])
    pipeline.train(file, resume=True)
    again = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("loss", line.get("evaluation")) for line in again] == [
        line.get("loss", line.get("evaluation")) for line in lines
    ]
