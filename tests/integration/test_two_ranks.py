"""Two gloo processes under torchrun, through the command line, train the run of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tests.integration.tiny_world import make_base, make_recipe

PROGRAM = Path(sysconfig.get_path("scripts")) / "lorafit"
FLAGS = ["train", "recipe.yaml", "--quiet", "--set", "training.micro_batch_tokens=64"]


def test_two_ranks_train_the_run_of_one(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    make_recipe(tmp_path, evaluation={"every_steps": 2}, training={"batch_size": 5})
    environment = {**os.environ, "LORAFIT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def run(*command: str | Path) -> None:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]

    run(PROGRAM, *FLAGS, "--output", "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run(*torchrun, PROGRAM, *FLAGS, "--output", "two")
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for alone, together in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "tokens", "trained_tokens"):
            if key in alone:
                assert together[key] == pytest.approx(alone[key], rel=1e-5)
        if "evaluation" in alone:
            assert together["evaluation"] == pytest.approx(alone["evaluation"], rel=1e-5)


def read_log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
