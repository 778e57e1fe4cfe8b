"""Two gloo processes under torchrun, through the command line, train the run of one process."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import ENVIRONMENT, PROGRAM, finish, start
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import make_recipe, make_rows, write_rows

FLAGS = ["train", "recipe.yaml", "--quiet", "--set", "training.micro_batch_tokens=64"]


def test_two_ranks_train_the_run_of_one(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    evaluation = {"every_steps": 2, "during": ["loss", "chrf"], "max_new_tokens": 4}  # each answers a part of the rows
    make_recipe(tmp_path, evaluation=evaluation, training={"batch_size": 5})
    environment = {**ENVIRONMENT, "LORAFIT_CACHE": str(tmp_path / "cache")}

    def run(*command: str | Path, **options: Any) -> None:
        done = finish(*command, cwd=tmp_path, env=environment, timeout=120, **options)
        assert done.returncode == 0, done.stderr[-2000:]

    run(PROGRAM, *FLAGS, "--output", "one")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run(*torchrun, PROGRAM, *FLAGS, "--output", "two", fresh=True)
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for alone, together in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "tokens", "trained_tokens"):
            if key in alone:
                assert together[key] == pytest.approx(alone[key], rel=1e-5)
        if "evaluation" in alone:
            assert together["evaluation"] == pytest.approx(alone["evaluation"], rel=1e-5)


def test_ranks_with_different_rows_do_not_train(tmp_path: Path) -> None:
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        make_base(tmp_path / rank / "base")
        make_recipe(tmp_path / rank)
    write_rows(tmp_path / "1" / "train.jsonl", make_rows(24, first=7))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = []
    for rank in ("0", "1"):
        own = {"RANK": rank, "LOCAL_RANK": rank, "LORAFIT_CACHE": str(tmp_path / "cache")}
        environment = {**ENVIRONMENT, **shared, **own}
        ranks.append(start(PROGRAM, *FLAGS, "--output", tmp_path / "run", cwd=tmp_path / rank, env=environment))
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [4, 4], said
    assert all("the 2 processes prepared different rows" in text.splitlines()[-1] for text in said)
    assert not (tmp_path / "run" / "manifest.json").exists()


def read_log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
