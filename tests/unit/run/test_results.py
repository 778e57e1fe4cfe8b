"""What `train` tells at its end."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

from lorafit.files.rundir import RunDir
from lorafit.plan import plan
from lorafit.run.trained import Trained
from lorafit.trainer.state import FitResult
from tests.support.plan_cases import ROWS, card, recipe, shape_of

MIB = 2**20
FIT = FitResult(
    steps=2, adapter_step=2, best=None, stopped_early=False, was_complete=False, tokens=9, padded_tokens=9,
    trained_tokens=9, seconds=1.0, peak_memory_bytes=1161 * MIB, peak_before_steps_bytes=1271 * MIB,
)  # fmt: skip


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (1271 * MIB, "peak memory in training: 1,161 MiB resident, 1,271 MiB before its first step"),
        (900 * MIB, "peak memory in training: 1,161 MiB resident"),
        (None, "peak memory of the whole run: 1,161 MiB resident"),
    ],
)
def test_a_peak_says_of_what_it_is(before: int | None, said: str) -> None:
    from rich.console import Console

    fit = replace(FIT, peak_before_steps_bytes=before)
    out = io.StringIO()
    Trained(RunDir(Path("run")), plan(recipe(), shape_of(), ROWS, card(80)), None, fit).render(Console(file=out))
    assert said in out.getvalue().splitlines()
