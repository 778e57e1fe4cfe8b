"""recipes/by_hand.py, which teaches, computes what `lorafit train` computes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.world import World, say_all

BY_HAND = Path(__file__).parents[2] / "recipes" / "by_hand.py"
STEPS = 6


@pytest.fixture
def by_hand(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What the file prints, a JSON object a line, for the world's base and rows."""
    arguments = [str(BY_HAND), str(world.base), str(world.root / "d.jsonl"), str(world.root / "by-hand"), str(STEPS)]
    monkeypatch.setattr("sys.argv", arguments)
    runpy.run_path(str(BY_HAND), run_name="__main__")
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_losses_and_weights_are_those_of_lorafit_train(world: World, by_hand: list[dict[str, Any]]) -> None:
    world.recipe(
        ("quantization: none", "quantization: nf4"),
        ("r: 4\n  alpha: 8", "r: 8\n  alpha: 16"),
        ("max_steps: 2\n  batch_size: 4", f"max_steps: {STEPS}\n  batch_size: 12"),
    )
    say_all(world.run("train", "r.yaml"), 0)
    lines = [json.loads(line) for line in (world.root / "run" / "metrics.jsonl").read_text().splitlines()]
    theirs = [line["loss"] for line in lines if "loss" in line]
    ours = [line["loss"] for line in by_hand if "loss" in line]
    assert len(ours) == STEPS and ours[-1] < 0.95 * ours[0]
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert all(line["forwards"] > 1 for line in by_hand if "loss" in line), "the step was not cut"
    saved, expected = (
        load_file(str(world.root / folder / "adapter_model.safetensors")) for folder in ("run/adapter", "by-hand")
    )
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name], tensor, atol=1e-4, rtol=1e-3)


def test_the_merged_weight_computes_what_the_adapter_does(by_hand: list[dict[str, Any]]) -> None:
    assert by_hand[-1]["largest_difference"] < 1e-5
