"""Layers that carry a state along the row: a card's verdict is the dry run's, since the closed form is too low."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorafit
from lorafit.errors import DoesNotFitError, ModelError
from tests.support.zoo_models import tiny_config


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(tiny_config("qwen3_next").to_dict()), encoding="utf-8")
    return {
        "name": "scan",
        "model": {"base": str(base)},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 384},
        "training": {"micro_batch_tokens": 384 * 32, "optimizer": "adamw"},
    }


def test_a_card_is_judged_by_the_dry_run(recipe: dict[str, Any]) -> None:
    alone = lorafit.estimate(recipe)
    assert alone.exact is None and alone.fits is None
    roomy = lorafit.estimate(recipe, gpu="24GiB")
    assert roomy.exact is not None and roomy.fits and not roomy.memory.gradient_checkpointing
    low, true = roomy.memory.needed_bytes, roomy.exact.needed_bytes
    assert low < 0.95 * true
    # a card between the two: the closed form alone would say that it fits
    card_mib = (low + true) / 2 / 0.95 / 2**20
    tight = lorafit.estimate(recipe, gpu=f"{card_mib:.1f}MiB")
    assert tight.memory.gradient_checkpointing and tight.exact is not None
    assert tight.without_checkpointing is not None and tight.without_checkpointing.needed_bytes == true
    assert tight.fits == (tight.exact.needed_bytes <= tight.device.memory_bytes * 0.95)  # type: ignore[union-attr]
    assert tight.enough is None and all(saving.fits is None for saving in tight.savings)
    assert all(method.fits is None for method in tight.methods)


def test_where_it_does_not_fit_nothing_is_promised(recipe: dict[str, Any]) -> None:
    recipe["training"]["gradient_checkpointing"] = False
    found = lorafit.estimate(recipe, gpu="600MiB")
    assert found.fits is False
    with pytest.raises(DoesNotFitError) as caught:
        found.raise_unless_fits()
    assert "; try " in str(caught.value) and "training.gradient_checkpointing: true" in str(caught.value)
    assert "it would fit with" not in str(caught.value) and "switches are enough" not in str(caught.value)


def test_fit_is_a_verdict_and_no_search(recipe: dict[str, Any]) -> None:
    found = lorafit.estimate(recipe, fit="24GiB")
    assert found.fits and found.exact is not None and found.fit is None
    assert "not looked for in such models" in str(found)


def test_where_no_dry_run_is_possible_nothing_is_said_to_fit(recipe: dict[str, Any]) -> None:
    """Its forward branches on numbers: who did not ask for --exact is not told to leave it out."""
    config = tiny_config("qwen4_exp_text").to_dict()
    Path(recipe["model"]["base"], "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = lorafit.estimate(recipe, gpu="24GiB")
    assert found.exact is None and found.fits is None and "cannot be told" in str(found)
    with pytest.raises(DoesNotFitError, match="cannot be told whether it fits"):
        found.raise_unless_fits()
    with pytest.raises(ModelError, match="leave --exact out"):
        lorafit.estimate(recipe, gpu="24GiB", exact=True)
