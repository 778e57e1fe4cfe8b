"""LoRA trained in other ways, from recipe to merge: a resumed run is the same run, and its file a plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lorafit import pipeline
from lorafit.model.adapter import read_adapter
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import make_recipe
from tests.support.world import stop_after

pytestmark = pytest.mark.usefixtures("memory_by_formula")


@pytest.mark.parametrize(("kind", "saved_as"), [("rslora", "rslora"), ("lora_plus", "lora"), ("lora_fa", "lora")])
def test_a_run_resumes_and_is_merged(kind: str, saved_as: str, tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    recipe, run = make_recipe(tmp_path, adapter={"kind": kind}), tmp_path / "run"
    pipeline.train(recipe)
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = load_file(run / "checkpoints" / "step-000002" / "adapter" / "adapter_model.safetensors")
    moved = {name for name, value in adapter.items() if not value.equal(first[name])}
    assert moved == {name for name in adapter if kind != "lora_fa" or "lora_B" in name}
    stop_after(run, 2)
    pipeline.train(recipe, resume=True)
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(value.equal(again[name]) for name, value in adapter.items())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("loss") for line in lines] == [line.get("loss") for line in steps]
    assert read_adapter(run / "adapter").kind.__name__.lower() == saved_as
    about = pipeline.evaluate(run, limit=2).evaluation.about
    trained = sum(value.numel() for name, value in adapter.items() if name in moved)
    assert about.trainable_parameters == trained
    assert pipeline.merge(run, output=tmp_path / "merged").report.verified
