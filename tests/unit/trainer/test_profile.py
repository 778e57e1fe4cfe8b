"""A profile says where the time goes and changes nothing in the run; a run's speed is held against the machine."""

from __future__ import annotations

import gzip
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit.ops import matmul_peak
from lorafit.trainer import profile
from lorafit.trainer.profile import PHASES, StepProfile
from lorafit.trainer.state import FitResult, TrainState
from tests.support.tiny_run import Job, TinyPlan


def profiled(root: Path, steps: int) -> tuple[Job, StepProfile]:
    profile = StepProfile(root / "profile.txt", root / "trace.json.gz", torch.device("cpu"))
    job = Job(root, plan=TinyPlan(total_steps=steps, save_every_steps=steps), profile=profile)
    job.trainer().fit(TrainState())
    return job, profile


def shares(table: str) -> dict[str, float]:
    rows = [line.split() for line in table.splitlines()]
    return {row[0]: float(row[1]) for row in rows if row and row[0] in (*PHASES, "step")}


@pytest.fixture(scope="module")
def five_steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, str]:
    """A profiled run, and the table that its profile gave."""
    job, profile = profiled(tmp_path_factory.mktemp("profiled"), 5)
    table = profile.finish()
    assert table is not None
    return job, table


def test_phases_add_up_to_the_step(five_steps: tuple[Job, str]) -> None:
    job, table = five_steps
    assert (job.root / "profile.txt").read_text().strip() == table
    seconds = shares(table)
    assert seconds["step"] == pytest.approx(sum(seconds[name] for name in PHASES), abs=1e-3)
    assert min(seconds["forward"], seconds["backward"], seconds["optimizer"]) > 0
    assert "mean of 2 steps" in table  # neither the first nor the traced ones
    assert "aten::mm" in table


def test_trace_names_phases_and_operations(five_steps: tuple[Job, str]) -> None:
    with gzip.open(five_steps[0].root / "trace.json.gz") as stream:
        names = [event.get("name") for event in json.load(stream)["traceEvents"]]
    assert names.count("lorafit: optimizer") == 2  # of the two traced steps
    assert "aten::mm" in names


@pytest.mark.parametrize("steps", [1, 2])
def test_a_short_run_takes_what_it_has(tmp_path: Path, steps: int) -> None:
    _, profile = profiled(tmp_path, steps)
    table = profile.finish()
    assert table is not None and "mean of 1 step)" in table
    assert (tmp_path / "trace.json.gz").exists() == (steps > 1)


def test_a_run_without_steps_has_no_profile(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path / "profile.txt", tmp_path / "trace.json.gz", torch.device("cpu"))
    assert profile.finish() is None
    assert not list(tmp_path.iterdir())


def test_slow_data_is_seen_as_data(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path / "profile.txt", tmp_path / "trace.json.gz", torch.device("cpu"))
    with profile.step():
        with profile.phase("data"):
            time.sleep(0.05)
        time.sleep(0.02)
    seconds = shares(profile.finish() or "")
    assert seconds["data"] >= 0.05
    assert seconds["waiting"] >= 0.02
    assert seconds["forward"] == 0


def test_the_run_is_the_same_with_and_without(five_steps: tuple[Job, str], tmp_path: Path) -> None:
    without = Job(tmp_path, plan=TinyPlan(total_steps=5, save_every_steps=5))
    without.trainer().fit(TrainState())
    assert five_steps[0].files(5) == without.files(5) != {}


def result(**values: Any) -> FitResult:
    state = TrainState(step=2, tokens=900, padded_tokens=1000, trained_tokens=300, seconds=10.0)
    return FitResult.of_complete(state)


def test_speed_is_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "find_peak", lambda *_: 4e9)
    cpu = torch.device("cpu")
    got = profile.measure_speed(result(), model_flops=20 * 10**9, device=cpu, devices=2, dtype=torch.bfloat16)
    assert got is not None
    assert (got.tokens_per_second, got.trained_tokens_per_second) == (90, 30)
    assert got.padding_share == pytest.approx(0.1)
    assert got.model_flops_utilisation == pytest.approx(20e9 / 10 / 8e9)  # two devices
    assert got.describe("row") == "90 tokens/s (30 rows/s), 10.0% padding, 25% of the measured peak of 8 GFLOP/s"
    slow = replace(got, trained_tokens_per_second=0.3)
    assert slow.describe("pair").startswith("90 tokens/s (0.3 pairs/s), ")


def test_the_loop_counts_padding(tmp_path: Path) -> None:
    job = Job(tmp_path, plan=TinyPlan(total_steps=2, save_every_steps=2), budget=80)
    fit = job.trainer().fit(TrainState())
    assert fit.tokens < fit.padded_tokens < 2 * fit.tokens
    alone = Job(tmp_path / "alone", plan=TinyPlan(total_steps=2, save_every_steps=2), budget=1).trainer()
    fit = alone.fit(TrainState())
    assert fit.padded_tokens == fit.tokens


def test_the_peak_is_measured_once_for_threads_and_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_peak, "_SIDES", {"cpu": (64, 128)})
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path))
    cpu = torch.device("cpu")
    first = profile.find_peak(cpu, torch.float32)
    assert first > 0
    assert profile.find_peak(cpu, torch.float32) == first  # to the last bit: it was not measured again
    profile.find_peak(cpu, torch.bfloat16)
    assert len(list((tmp_path / "peaks").iterdir())) == 2
    for file in (tmp_path / "peaks").iterdir():
        file.write_text("{broken")
    assert profile.find_peak(cpu, torch.float32) > 0


def test_the_fastest_product_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_peak, "_SIDES", {"cpu": (64, 128)})
    monkeypatch.setattr(matmul_peak, "_time_product", lambda a, b: 1.0 if len(a) == 64 else 2.0)
    peak = matmul_peak.measure_matmul_peak("cpu", torch.float32, seconds=0.0)
    assert peak == 2.0 * 128**3 / 2.0
