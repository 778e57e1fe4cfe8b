"""A base whose linears are of several kinds: trained, resumed, scored and merged like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafit import pipeline
from lorafit.files.atomic import read_object
from tests.support.option_world import OptionWorld, adapter_tensors, scores_of, step_lines

MIXED: dict[str, Any] = {
    "model.quantization": {"kind": "mixed", "linears": {"down_proj": "int8", "o_proj": "none", "q_proj": "fp4"}},
    "training.max_steps": 4,
    "checkpoints.every_steps": 2,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> OptionWorld:
    return OptionWorld(tmp_path_factory.mktemp("mixed"))


def test_a_resume_is_the_same_run(world: OptionWorld) -> None:
    run = world.train(MIXED)
    before = [line["loss"] for line in step_lines(run)], adapter_tensors(run)
    assert before[0][-1] < before[0][0]
    again = pipeline.train(run.root.parent / "recipe.yaml", resume_from=2).run
    assert ([line["loss"] for line in step_lines(again)], adapter_tensors(again)) == before
    kinds = {path.rsplit(".", 1)[-1]: proof["kind"] for path, proof in read_object(run.quantization)["tensors"].items()}
    assert kinds == {
        "q_proj": "fp4", "k_proj": "nf4", "v_proj": "nf4", "gate_proj": "nf4", "up_proj": "nf4", "down_proj": "int8",
    }  # fmt: skip


def test_a_merge_rebuilds_each_kind_and_agrees_with_the_adapter(world: OptionWorld, tmp_path: Path) -> None:
    merged = pipeline.merge(world.train(MIXED).root, output=tmp_path / "merged")
    assert merged.parity is not None  # compared with the adapter's own answers: else exit 9
    assert merged.report.proven and merged.report.rebuilt_tensors == len(
        read_object(world.train(MIXED).quantization)["tensors"]
    )


def test_it_is_scored_beside_its_base(world: OptionWorld) -> None:
    assert scores_of(world.evaluate({}, MIXED))
