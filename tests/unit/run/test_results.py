"""What `train` tells at its end."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

from lorafit.answering.generate import Answer
from lorafit.files.rundir import RunDir
from lorafit.plan import plan
from lorafit.run.answered import Generated
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


def test_answers_about_images_name_their_files() -> None:
    from rich.console import Console

    from lorafit.kinds.formats import formats

    parts = [{"type": "image", "path": "b.png"}, {"type": "text", "text": "and this?"}]
    turns = [
        {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "what"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": parts},
    ]
    asked = formats.get("image_messages").read_prompt({"messages": turns}, "p.jsonl", 1)
    answers, out = Generated([asked], [Answer("blue", 1, 0.0, "stop")], None), io.StringIO()
    assert answers.to_json()["answers"][0]["images"] == ["a.png", "b.png"]
    answers.render(Console(file=out))
    assert out.getvalue().splitlines() == ["> [image: b.png]and this?", "blue"]
