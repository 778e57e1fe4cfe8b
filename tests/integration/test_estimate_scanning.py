"""Layers that carry a state along the row: no formula describes them, so every answer is measured, and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorafit
from lorafit.errors import DoesNotFitError, ModelError
from lorafit.estimation import dry_run
from lorafit.facts import DatasetFacts, DeviceFacts
from lorafit.memory import closed_form
from tests.support.zoo_models import tiny_config

ROWS = DatasetFacts(40, 40 * 150, 40 * 150, 192, 191)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(tiny_config("qwen3_next").to_dict()), encoding="utf-8")
    return {
        "name": "scan",
        "model": {"base": str(base)},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 192},
        "training": {"micro_batch_tokens": 192 * 48, "optimizer": "adamw"},
    }


def test_a_few_layers_tell_what_the_whole_step_holds(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "own-cache"))
    recipe["training"]["gradient_checkpointing"] = False
    found = lorafit.estimate(recipe, exact=True)
    assert found.exact is not None and found.memory.counts_all
    assert found.memory.tensor_bytes == pytest.approx(found.exact.tensor_bytes, rel=0.02)
    low = closed_form(found.asked.step, found.memory.micro_batch_tokens, False)
    assert low.tensor_bytes < 0.95 * found.exact.tensor_bytes
    assert found.methods == found.savings == ()  # each would be a dry run; a card asks for them
    monkeypatch.setattr(dry_run, "DryRun", None)  # the answer is in the cache
    assert lorafit.estimate(recipe).memory == found.memory


def test_a_card_is_judged_by_what_was_measured(recipe: dict[str, Any]) -> None:
    roomy = lorafit.estimate(recipe, gpu="24GiB")
    assert roomy.fits and not roomy.memory.gradient_checkpointing and roomy.methods and not roomy.savings
    low = closed_form(roomy.asked.step, roomy.memory.micro_batch_tokens, False).needed_bytes
    # a card between the two: the closed form alone would say that it fits
    card_mib = (low + roomy.memory.needed_bytes) / 2 / 0.95 / 2**20
    tight = lorafit.estimate(recipe, gpu=f"{card_mib:.1f}MiB")
    assert tight.fits and tight.memory.gradient_checkpointing
    assert tight.without_checkpointing is not None
    assert tight.without_checkpointing.needed_bytes == roomy.memory.needed_bytes


@pytest.mark.slow
def test_where_it_does_not_fit_what_is_promised_was_measured(recipe: dict[str, Any]) -> None:
    recipe["training"]["gradient_checkpointing"] = False
    found = lorafit.estimate(recipe, gpu="640MiB")
    assert found.fits is False and found.enough is not None
    with pytest.raises(DoesNotFitError, match="it would fit with"):
        found.raise_unless_fits()
    flags = [flag.removeprefix("--set ").strip("'") for flag in found.enough.flags]
    pasted = lorafit.estimate(recipe, overrides=flags, gpu="640MiB")
    assert pasted.fits and pasted.memory.needed_bytes == found.enough.needed_bytes


@pytest.mark.slow
def test_fit_searches(recipe: dict[str, Any]) -> None:
    found = lorafit.estimate(recipe, fit="2GiB").fit
    assert found is not None and found.rank is not None and found.row.value is not None
    largest = found.micro_batch
    assert largest.value is not None
    for tokens, fits in ((largest.value, True), (largest.value + 1, False)):
        flags = [f"training.micro_batch_tokens={tokens}", f"training.gradient_checkpointing={largest.checkpointing}"]
        assert lorafit.estimate(recipe, overrides=flags, gpu="2GiB").fits is fits


def test_a_plan_counts_them(recipe: dict[str, Any]) -> None:
    from lorafit.contracts import Silent
    from lorafit.estimation.measured import MeasuredSteps
    from lorafit.model.class_shape import find_shape
    from lorafit.plan import plan
    from lorafit.recipe.schema import Recipe

    config = tiny_config("qwen3_next").to_dict()
    device = DeviceFacts("cpu", "cpu", 8 * 2**30, True)
    checked = Recipe.model_validate(recipe)
    low, true = (
        plan(checked, find_shape(config), ROWS, device, *engine).memory.tensor_bytes
        for engine in ((), (MeasuredSteps(config, Silent()),))
    )
    assert low < 0.95 * true


def test_where_no_dry_run_is_possible_nothing_is_said_to_fit(recipe: dict[str, Any]) -> None:
    """Its forward branches on numbers: who did not ask for --exact is not told to leave it out."""
    config = tiny_config("qwen4_exp_text").to_dict()
    Path(recipe["model"]["base"], "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = lorafit.estimate(recipe, gpu="24GiB")
    assert found.exact is None and found.fits is None and "cannot be told" in str(found) and "too low" in str(found)
    with pytest.raises(DoesNotFitError, match="cannot be told whether it fits"):
        found.raise_unless_fits()
    with pytest.raises(ModelError, match="leave --exact out"):
        lorafit.estimate(recipe, gpu="24GiB", exact=True)
