"""`training.deterministic`: in force while a run takes its steps, kept by a resume, and gone afterwards."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import yaml

from lorafit import pipeline
from lorafit.errors import CheckpointError, RecipeError
from lorafit.trainer.step import Update
from tests.support.option_world import OptionWorld, adapter_tensors

ON = {"training.deterministic": True}
State = tuple[bool, bool, str | None]
OFF: State = (False, True, None)


def state() -> State:
    fills = torch.utils.deterministic.fill_uninitialized_memory
    return torch.are_deterministic_algorithms_enabled(), fills, os.environ.get("FLASH_ATTENTION_DETERMINISTIC")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[State]:
    """What holds at each update."""
    found, apply = [], Update.apply

    def look(self: Update, *arguments: Any, **options: Any) -> Any:
        found.append(state())
        return apply(self, *arguments, **options)

    monkeypatch.setattr(Update, "apply", look)
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> OptionWorld:
    return OptionWorld(tmp_path_factory.mktemp("tiny"))


def test_it_holds_while_steps_are_taken_and_in_a_resume(tiny: OptionWorld, seen: list[State]) -> None:
    file = tiny.recipe(ON)
    run = pipeline.train(file).run
    assert (seen, state()) == ([(True, False, "1")] * 2, OFF)
    with pytest.raises(CheckpointError, match=r"training\.deterministic"):
        pipeline.train(file, overrides=["training.deterministic=false", "training.max_steps=3"], resume=True)
    pipeline.train(file, overrides=["training.max_steps=3"], resume=True)
    assert (seen, state()) == ([(True, False, "1")] * 3, OFF)
    unbroken = pipeline.train(tiny.recipe({"training.max_steps": 3})).run
    assert seen[3:] == [OFF] * 3
    assert adapter_tensors(run) == adapter_tensors(unbroken)  # a CPU's sums were in order before


def test_a_run_that_never_heard_of_it_goes_on(tiny: OptionWorld, seen: list[State]) -> None:
    file = tiny.recipe({})
    recorded = pipeline.train(file).run.recipe
    values = yaml.safe_load(recorded.read_text())
    assert values["training"].pop("deterministic") is False
    recorded.write_text(yaml.safe_dump(values))
    pipeline.train(file, overrides=["training.max_steps=3"], resume=True)
    assert seen == [OFF] * 3


def test_an_operation_without_a_deterministic_form_is_the_recipes_fault(
    tiny: OptionWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(self: Update, *arguments: Any, **options: Any) -> None:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))

    monkeypatch.setattr(Update, "apply", put)
    file = tiny.recipe(ON)
    with pytest.raises(RecipeError, match="put_ does not have a deterministic implementation") as caught:
        pipeline.train(file)
    assert str(caught.value).startswith(f"{file}:") and "training.deterministic: this model" in str(caught.value)
    assert state() == OFF


def test_the_plan_says_its_price() -> None:
    from lorafit.plan import plan
    from tests.support.plan_cases import ROWS, card, recipe, shape_of

    def warned(kind: str, *, on: bool) -> bool:
        found = plan(recipe(training={"deterministic": on}), shape_of(), ROWS, card(80, kind=kind)).warnings
        return any("attention is slower and holds more memory" in warning for warning in found)

    assert warned("cuda", on=True)
    assert not warned("cuda", on=False)
    assert not warned("cpu", on=True)
