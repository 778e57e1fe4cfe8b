"""A run with `fused` attention from end to end: trained, taken up again, evaluated, asked; and what `auto` stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafit import pipeline
from lorafit.files.atomic import read_object
from tests.support.option_world import OptionWorld, adapter_tensors

CHANGES = {
    "model.attention": "fused",
    "adapter.dropout": 0.2,
    "checkpoints": {"every_steps": 1},
    "data.test": "../rows/test.jsonl",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> OptionWorld:
    return OptionWorld(tmp_path_factory.mktemp("fused"))


def test_a_run_goes_on_bit_for_bit_and_serves_every_command(world: OptionWorld) -> None:
    whole = pipeline.train(world.recipe(CHANGES)).run
    recipe = world.recipe(CHANGES)
    pipeline.train(recipe)
    again = pipeline.train(recipe, resume_from=1).run
    assert read_object(again.plan)["attention"] == "fused"
    assert adapter_tensors(again) == adapter_tensors(whole)
    assert (whole.root / "adapter").is_dir()
    assert pipeline.evaluate(whole.root).evaluation.comparisons
    answers = pipeline.generate(whole.root, prompt="and the answer?", max_new_tokens=4)
    assert answers.answers


@pytest.mark.parametrize("attention", ["eager", "fused", "sdpa"])
def test_the_stored_estimate_is_of_the_attention_that_was_chosen(
    world: OptionWorld, attention: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path))
    monkeypatch.setattr("lorafit.trainer.stage._open_candidates", lambda *_: [attention])
    stored = {}
    for asked in ("auto", attention):
        run = pipeline.train(world.recipe({"model.attention": asked})).run
        stored[asked] = read_object(run.plan)
    assert stored["auto"]["attention"] == attention
    assert stored["auto"]["memory"] == stored[attention]["memory"]
