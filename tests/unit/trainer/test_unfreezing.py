"""The upper layers are trained first; what waits takes no gradient, no state and no decay, and a resume is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafit import pipeline
from lorafit.errors import LorafitError, RecipeError
from lorafit.ops.step_hook import StepHook
from lorafit.recipe.load import load_recipe
from lorafit.trainer.state import TrainState
from lorafit.trainer.unfreezing import Unfreezing
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import make_recipe
from tests.support.tiny_run import Job, TinyPlan

LAYERS = {f"model.layers.{number}": number for number in range(12)}


def unfreezing(top: int, steps: list[int], first: int = 0) -> tuple[Unfreezing, dict[str, torch.nn.Parameter]]:
    names = ["score.weight", *(f"x.model.layers.{number}.up.lora_A.weight" for number in range(first, 12))]
    parameters = {name: torch.nn.Parameter(torch.zeros(1)) for name in names}
    return Unfreezing(parameters, LAYERS, top, steps), parameters


def test_equal_parts_join_from_the_top_down_and_what_is_in_no_layer_is_never_frozen() -> None:
    hook, parameters = unfreezing(2, [3, 5])
    assert [hook.layers_at(step) for step in (1, 2)] == [[11, 10]] * 2
    assert hook.layers_at(3) == hook.layers_at(4) == [11, 10, 9, 8, 7, 6, 5]
    assert hook.layers_at(5) == hook.layers_at(99) == list(range(11, -1, -1))
    for step in (5, 1):  # also back, as where a run resumes before
        hook.before_step(step)
        frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
        assert frozen == {
            f"x.model.layers.{number}.up.lora_A.weight" for number in range(12) if number not in hook.layers_at(step)
        }


def test_the_log_says_when_layers_join(job: Callable[..., Job]) -> None:
    assert [unfreezing(2, [3, 5])[0].news(step) for step in range(1, 7)] == [
        None,
        None,
        "5 more layers are trained from here on, 7 of 12",
        None,
        "5 more layers are trained from here on, 12 of 12",
        None,
    ]

    class Speaking(StepHook):
        def news(self, step: int) -> str | None:
            return "a word" if step == 3 else None

    one = job(hooks=lambda model: [Speaking()], plan=TinyPlan(total_steps=4, save_every_steps=2))
    trainer = one.trainer()
    said: list[str] = []
    trainer.journal.reporter.info = said.append  # type: ignore[method-assign]
    trainer.fit(TrainState())
    assert "step 3: a word" in said and sum("a word" in line for line in said) == 1


def test_only_trained_layers_count() -> None:
    assert unfreezing(1, [2], first=9)[0].layers_at(1) == [11]
    with pytest.raises(RecipeError, match="3 layers are trained, and 3 of them from the first step"):
        unfreezing(3, [2], first=9)


def test_a_run_trains_the_upper_layer_first_and_resumes_as_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    make_base(tmp_path / "base")
    training = {
        "max_steps": 6,
        "unfreezing": {"top": 1, "steps": [4]},
        "optimizer": {"kind": "adamw", "weight_decay": 0.5},
    }
    recipe = make_recipe(tmp_path, training=training, checkpoints={"every_steps": 2, "keep_last": 9})
    run = pipeline.train(recipe).run
    adapters = {step: load_file(run.checkpoint(step) / "adapter" / "adapter_model.safetensors") for step in (0, 2, 6)}
    assert len(adapters[0]) == 28
    for name, value in adapters[0].items():
        assert torch.equal(value, adapters[2][name]) == (".layers.0." in name)
        assert not torch.equal(value, adapters[6][name])
    states = load_file(run.checkpoint(2) / "optimizer.safetensors")
    assert states and not any(".layers.0." in name for name in states)
    whole = {file.name: file.read_bytes() for file in run.checkpoint(6).rglob("*.safetensors")}
    for step in (2, 4):
        pipeline.train(recipe, resume_from=step)
        assert {file.name: file.read_bytes() for file in run.checkpoint(6).rglob("*.safetensors")} == whole


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"unfreezing": {"top": 1, "steps": [3, 2]}}}, "they must rise, from 2 on"),
        (
            {"training": {"unfreezing": {"top": 1, "steps": [9]}}},
            r"training.unfreezing.steps: end behind training.max_steps 4",
        ),
        (
            {"training": {"unfreezing": {"top": 1, "steps": [2]}}, "adapter": {"kind": "adalora"}},
            "takes ranks from what the loss",
        ),
    ],
)
def test_what_would_train_otherwise_than_asked_is_refused(tmp_path: Path, sections: Any, message: str) -> None:
    with pytest.raises(LorafitError, match=message):
        load_recipe(make_recipe(tmp_path, **sections))
