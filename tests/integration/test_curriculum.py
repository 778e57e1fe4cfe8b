"""A run with a curriculum: rows by what the kind measures, in plan and preview, and the same run after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from lorafit import pipeline
from lorafit.contracts import Silent
from lorafit.errors import CheckpointError, DataError
from lorafit.job import open_job
from lorafit.recipe.load import load_recipe
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import make_recipe, make_rows, write_rows

pytestmark = pytest.mark.usefixtures("memory_by_formula")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    make_base(tmp_path / "base")
    return tmp_path


def recipe_of(world: Path, curriculum: Any) -> Path:
    recipe = make_recipe(
        world,
        training={"max_steps": 4, "batch_size": 3, "schedule": "constant", "curriculum": curriculum},
        checkpoints={"every_steps": 2},
    )
    rows = [{**row, "rank": (number * 7) % 24} for number, row in enumerate(make_rows(24))]
    write_rows(world / "train.jsonl", rows)
    return recipe


def tokens_of(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["trained_tokens"] for line in lines if "trained_tokens" in line]


def adapter_of(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_losses_at_step_0_order_the_rows_and_a_resume_is_the_same_run(world: Path) -> None:
    recipe = recipe_of(world, {"kind": "loss", "until": 1.0})
    whole = pipeline.train(recipe).run
    difficulty = load_file(whole.curriculum)["difficulty"]
    seen = pipeline.evaluate(whole.root, split="train", overrides=["evaluation.final=[loss]"]).evaluation
    base = {row.line: row.base.value("loss") / row.base.value("weight") for row in seen.rows}
    rows = open_job(load_recipe(recipe), Silent()).rows.train
    np.testing.assert_allclose(difficulty, [base[int(line)] for line in rows.lines], rtol=1e-5)

    before = adapter_of(whole.root)
    pipeline.train(recipe, resume_from=2)
    assert adapter_of(whole.root) == before
    whole.curriculum.unlink()
    with pytest.raises(CheckpointError, match="which rows the next steps are drawn from"):
        pipeline.train(recipe, resume_from=2)


def test_a_column_orders_rows_as_plan_and_preview_say(world: Path) -> None:
    """Also that a longer run is another one, and that the order is the run's whatever its files say by now."""
    column = {"kind": "column", "column": "rank", "easiest_is": "highest", "easiest": 0.125, "until": 1.0}
    recipe = recipe_of(world, column)
    told = "easiest rows first, by rank: step 1 is drawn from the easiest 3 of 24 rows, 23 to 21; the hardest has 0"
    assert pipeline.preview(recipe, show=1).to_json()["curriculum"] == told
    paced = pipeline.train(recipe, dry_run=True).plan.to_json()["curriculum"]
    assert paced["measures"] == "rank" and paced["all_from_step"] == 5 and paced["hardest_seen"] == 0.0

    run = pipeline.train(recipe).run
    rows = open_job(load_recipe(recipe), Silent()).rows.train
    easiest = [number for number in range(24) if (number * 7) % 24 >= 21]  # three rows: what step 1 must be
    assert tokens_of(run.root)[0] == sum(int(rows.trained_tokens[row]) for row in easiest)
    before = adapter_of(run.root)
    write_rows(world / "train.jsonl", make_rows(24))
    pipeline.train(recipe, resume_from=2)
    assert adapter_of(run.root) == before
    with pytest.raises(CheckpointError, match="max_steps"):
        pipeline.train(recipe, overrides=["training.max_steps=8"], resume=True)


def test_a_row_without_a_number_is_an_error_before_the_model_is_loaded(world: Path) -> None:
    recipe = recipe_of(world, {"kind": "column", "column": "rnak"})
    with pytest.raises(DataError, match=r"train\.jsonl:1.*missing column 'rnak'.*did you mean 'rank'"):
        pipeline.train(recipe, dry_run=True)
    rows = [{**row, "rank": 1 if number else "hard"} for number, row in enumerate(make_rows(5))]
    recipe = recipe_of(world, {"kind": "column", "column": "rank"})
    write_rows(world / "train.jsonl", rows)
    with pytest.raises(DataError, match=r"train\.jsonl:1.*expected a number, found string 'hard'"):
        pipeline.preview(recipe)
