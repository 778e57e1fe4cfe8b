"""A run whose packing is left open, from end to end, on a CPU that is taken for a card where attention is chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lorafit import pipeline
from lorafit.files.atomic import read_object
from lorafit.model import attention
from lorafit.trainer.stage import Stage
from tests.support.documents_kernel import CALLS, register_documents_kernel
from tests.support.option_world import OptionWorld, adapter_tensors, step_lines

CHANGES = {
    "model.attention": "auto",
    "adapter.dropout": 0.2,
    "checkpoints": {"every_steps": 1},
    "data.test": "../rows/test.jsonl",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> OptionWorld:
    return OptionWorld(tmp_path_factory.mktemp("varlen"))


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register_documents_kernel()
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path))
    monkeypatch.setattr(attention, "_capability_of", lambda tensor: (8, 0))
    monkeypatch.setattr(attention, "takes_documents", lambda *_: True)
    monkeypatch.setattr("lorafit.plan.recipe_step._packed", lambda step, **_: replace(step, packing=None))
    monkeypatch.setattr("lorafit.run.assembly.takes_varlen", lambda step: True)
    monkeypatch.setattr("lorafit.trainer.stage._open_candidates", candidates)
    CALLS.clear()


def candidates(stage: Stage, *_: object) -> list[str]:
    assert stage.packing is None
    return ["varlen", "sdpa"] if stage.takes_varlen else ["sdpa"]


def test_a_run_goes_on_bit_for_bit_and_serves_every_command(world: OptionWorld) -> None:
    whole = pipeline.train(world.recipe(CHANGES)).run
    recipe = world.recipe(CHANGES)
    pipeline.train(recipe)
    assert CALLS
    again = pipeline.train(recipe, resume_from=1).run
    assert read_object(again.plan)["attention"] == "varlen" == read_object(again.root / "card.json")["attention"]
    assert read_object(again.plan)["plan"]["packing"] == "auto"
    assert adapter_tensors(again) == adapter_tensors(whole)
    assert pipeline.evaluate(whole.root).evaluation.comparisons
    assert pipeline.generate(whole.root, prompt="and the answer?", max_new_tokens=4).answers
    padded = pipeline.train(world.recipe({**CHANGES, "data.packing": False, "model.attention": "sdpa"})).run
    assert [line["tokens"] for line in step_lines(padded)] == [line["tokens"] for line in step_lines(whole)]


def test_a_run_from_before_stays_padded(world: OptionWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plan names sdpa, and its recipe says nothing of packing, which meant `false` then."""
    recipe = world.recipe(CHANGES)
    with monkeypatch.context() as before:
        before.setattr("lorafit.run.assembly.takes_varlen", lambda step: False)
        whole = adapter_tensors(pipeline.train(recipe).run)
    again = pipeline.train(recipe, resume_from=1).run
    assert read_object(again.plan)["attention"] == "sdpa" and adapter_tensors(again) == whole and not CALLS
