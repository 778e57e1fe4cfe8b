"""Dequantised copies that a run keeps change its speed and its memory, and nothing that it leaves."""

from __future__ import annotations

from typing import Any

import pytest

from lorafit import pipeline
from lorafit.files.atomic import read_object
from lorafit.files.rundir import RunDir
from tests.support.option_world import OptionWorld, adapter_tensors, scores_of, step_lines


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> OptionWorld:
    return OptionWorld(tmp_path_factory.mktemp("unpacked"))


def nf4(keep_unpacked: bool, **changes: Any) -> dict[str, Any]:
    section = {"kind": "nf4", "keep_unpacked": keep_unpacked}
    return {"model.quantization": section, "model.dtype": "bf16", "adapter.dropout": 0.1, **changes}


def steps_of(run: RunDir) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in step_lines(run)]


def test_a_run_leaves_the_same(world: OptionWorld) -> None:
    kept, unpacked = world.train(nf4(True)), world.train(nf4(False))
    assert [read_object(run.plan)["plan"]["keeps_unpacked"] for run in (kept, unpacked)] == [True, False]
    assert steps_of(kept) == steps_of(unpacked)
    assert adapter_tensors(kept) == adapter_tensors(unpacked)
    assert read_object(kept.quantization) == read_object(unpacked.quantization)  # hashes of all of the base
    assert scores_of(world.evaluate({}, nf4(True))) == scores_of(world.evaluate({}, nf4(False)))


def test_a_resume_may_change_it(world: OptionWorld) -> None:
    whole = world.train(nf4(True, **{"training.max_steps": 4, "checkpoints.every_steps": 2}))
    before = steps_of(whole), adapter_tensors(whole)
    file = whole.root.parent / "recipe.yaml"
    again = pipeline.train(file, resume_from=2, overrides=["model.quantization.keep_unpacked=false"])
    assert not again.plan.keeps_unpacked
    assert (steps_of(again.run), adapter_tensors(again.run)) == before
