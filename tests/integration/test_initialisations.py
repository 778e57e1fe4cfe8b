"""Runs that begin otherwise than by LoRA's own rule: trained, gone on with, scored and merged as any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorafit.files.atomic import read_object
from tests.support.world import World, say_all, stop_after

RUNS = (("pissa", "nf4"), ("olora", "int8"), ("eva", "none"), ("loftq", "nf4"), ("corda", "nf4"))


def adapter_of(folder: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in load_file(folder / "adapter_model.safetensors").items()}


@pytest.mark.usefixtures("memory_by_formula")
@pytest.mark.parametrize(("init", "quantization"), RUNS)
def test_a_run_resumes_is_scored_and_merged(world: World, init: str, quantization: str) -> None:
    world.recipe(
        ("  dropout: 0.0", f"  dropout: 0.1\n  init: {init}"), ("quantization: none", f"quantization: {quantization}")
    )
    trained = world.run("train", "r.yaml")
    say_all(trained, 0, *(["begins with", "at once"] if init != "eva" else ["begins with", "32 train rows forward"]))
    run, before = world.root / "run", world.weights()
    steps = [adapter_of(run / "checkpoints" / f"step-{step:06d}" / "adapter") for step in (1, 2)]
    assert steps[0].keys() == steps[1].keys() and steps[0] != steps[1]
    stop_after(run, 1)
    again = world.run("train", "r.yaml", "--resume")
    say_all(again, 0)
    assert world.weights() == before
    config = read_object(run / "adapter" / "adapter_config.json")
    assert config["init_lora_weights"] is True  # nothing begins again where it is opened
    say_all(world.run("eval", "run", "--set", "data.test=d.jsonl"), 0)
    merged = world.run("merge", "run", "--output", "merged", "--json")
    say_all(merged, 0)
    assert merged.json["parity"] is not None


@pytest.mark.usefixtures("memory_by_formula")
def test_what_a_run_refers_to_is_its_base_with_what_it_begins_with(world: World) -> None:
    """DPO's reference is the model before step 1, whose adapter is the base but for rounding; it is kept."""
    preferences = ("name: tiny", "name: tiny\ntask: dpo"), ("final: [perplexity]", "final: [loss]")
    world.recipe(("  dropout: 0.0", "  dropout: 0.0\n  init: pissa"), *preferences)
    pairs = '{"prompt": "red %d?", "chosen": "yes it is", "rejected": "no"}\n'
    (world.root / "d.jsonl").write_text("".join(pairs % number for number in range(12)))
    say_all(world.run("train", "r.yaml"), 0)
    run, before = world.root / "run", world.weights()
    first = load_file(run / "first-adapter" / "adapter_model.safetensors")
    assert all(torch.equal(b[:, :4], -b[:, 4:]) and b.any() for name, b in first.items() if "lora_B" in name)
    stop_after(run, 1)
    say_all(world.run("train", "r.yaml", "--resume"), 0)
    assert world.weights() == before


def test_what_shall_stay_is_named(world: World) -> None:
    world.recipe(("  dropout: 0.0", "  dropout: 0.0\n  init: {kind: corda, mode: kpm}"))
    say_all(
        world.run("validate", "r.yaml"), 3, "adapter.init", "reads the rows of evaluation.retention, which is not set"
    )
    say_all(world.run("validate", "r.yaml", "--set", "evaluation.retention=d.jsonl"), 0)
