"""A run that is killed at random moments and resumed each time is the run that was never killed, bit for bit."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import ENVIRONMENT, PROGRAM, Process, start
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import make_recipe

STEPS = 24
SLOW_STEPS = {"model": {"quantization": "nf4", "dtype": "bf16"}, "adapter": {"dropout": 0.3}}
NOT_COMPARED = ("seconds",)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    make_base(folder / "base", layers=4)
    make_recipe(
        folder,
        model=SLOW_STEPS["model"],
        adapter=SLOW_STEPS["adapter"],
        training={"max_steps": None, "epochs": 3, "batch_size": 3, "micro_batch_tokens": 64, "optimizer": "adamw_8bit"},
        evaluation={"every_steps": 5},
        checkpoints={"every_steps": 3},
    )
    return folder


def start_training(world: Path, output: str, *flags: str, fresh: bool = False) -> Process:
    environment = {**ENVIRONMENT, "LORAFIT_CACHE": str(world / "cache")}
    words = ["train", "recipe.yaml", "--output", output, "--quiet", *flags]
    return start(PROGRAM, *words, cwd=world, env=environment, stdout=subprocess.DEVNULL, fresh=fresh)


def finish(world: Path, output: str, *flags: str, fresh: bool = False) -> None:
    process = start_training(world, output, *flags, fresh=fresh)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def log_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in NOT_COMPARED} for line in lines]


def wait_for(run: Path, steps: int, process: Process) -> None:
    """Until the log holds that many steps, or -1: until step 0 is published; or the process is done."""
    while process.poll() is None:
        log = run / "metrics.jsonl"
        if steps < 0 and (run / "checkpoints" / "step-000000").is_dir():
            return
        if steps >= 0 and log.is_file() and sum(b'"loss"' in line for line in log.read_bytes().splitlines()) >= steps:
            return
        time.sleep(0.002)


def kill_and_resume(world: Path, name: str, kills: int, seed: int) -> Path:
    """Kills at random steps, the first before the first regular checkpoint, and resumes until the run is done."""
    moments = random.Random(seed)
    run = world / name
    killed = 0
    at = [-1, *sorted(moments.randrange(1, STEPS - 1) for _ in range(kills - 1))]
    for number, steps in enumerate(at):
        process = start_training(world, name, *(["--resume"] if number else []))
        wait_for(run, steps, process)
        time.sleep(moments.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed >= kills - 1, "the kills came too late to count"
    finish(world, name, "--resume", fresh=True)  # another seed of hashes as well
    return run


def compare(run: Path, unbroken: Path) -> None:
    last = f"checkpoints/step-{STEPS:06d}"
    for name in (
        f"{last}/adapter/adapter_model.safetensors",
        f"{last}/optimizer.safetensors",
        "adapter/adapter_model.safetensors",
    ):
        assert (run / name).read_bytes() == (unbroken / name).read_bytes(), name
    assert log_of(run) == log_of(unbroken)
    states = [json.loads((folder / last / "state.json").read_text())["train"] for folder in (run, unbroken)]
    for state in states:
        state.pop("seconds")
    assert states[0]["rng"] == states[1]["rng"]
    assert states[0] == states[1]


@pytest.mark.parametrize(
    "kills", [pytest.param(3, id="3-kills"), pytest.param(12, id="12-kills", marks=pytest.mark.slow)]
)
def test_a_killed_run_resumes_as_the_same_run(world: Path, kills: int) -> None:
    if not (world / "unbroken").exists():
        finish(world, "unbroken")
    steps = [line["step"] for line in log_of(world / "unbroken") if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    run = kill_and_resume(world, f"killed-{kills}", kills, seed=kills)
    compare(run, world / "unbroken")
