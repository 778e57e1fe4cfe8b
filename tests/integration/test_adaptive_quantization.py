"""A base whose linears are stored as calibration rows say: chosen once, and then the run's for whoever opens it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit import pipeline
from lorafit.contracts import Silent
from lorafit.errors import DoesNotFitError, NumericsError, RecipeError, ResourceError
from lorafit.facts import LinearShape
from lorafit.files.atomic import read_object
from lorafit.files.rundir import RunDir
from lorafit.plan import show_plan
from lorafit.run import calibration
from lorafit.run.card import read_card
from tests.support.option_world import OptionWorld, adapter_tensors, scores_of, step_lines

ADAPTIVE: dict[str, Any] = {
    "model.quantization": {"kind": "adaptive", "bits": 7.0},  # tables are a third of so small a linear
    "training.max_steps": 4,
    "checkpoints.every_steps": 2,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> OptionWorld:
    return OptionWorld(tmp_path_factory.mktemp("adaptive"))


def kinds_of(run: RunDir) -> dict[str, str]:
    """As the base that was trained on had them."""
    return {path: proof["kind"] for path, proof in read_object(run.quantization)["tensors"].items()}


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("rows were asked again")


def test_the_table_says_what_is_stored_and_stays_within_the_budget(world: OptionWorld) -> None:
    run = world.train(ADAPTIVE)
    table = read_object(run.sensitivity)
    assert 6.5 < table["bits"] <= 7.0
    chosen = {line["path"]: line["kind"] for line in table["linears"]}
    assert {path: kind for path, kind in chosen.items() if kind != "none"} == kinds_of(run)
    assert read_object(run.plan)["linears"] == read_card(run.card).to_json()["quantization"]["linears"] == chosen
    assert len(set(chosen.values())) > 1 and len(chosen) == 14


class Shown(Silent):
    """Counts the plans that it shows."""

    plans = 0

    def show(self, renderable: Any) -> None:
        """Counts it."""
        self.plans += str(renderable.title).startswith("plan: ")


def test_the_plan_is_shown_again_only_where_it_says_something_else(world: OptionWorld) -> None:
    first, reporter = world.plan(ADAPTIVE), Shown()
    show_plan(replace(first), reporter, first)
    assert (reporter.plans, reporter.warnings) == (0, [])
    show_plan(replace(first, total_steps=first.total_steps + 1, warnings=("another",)), reporter, first)
    assert (reporter.plans, reporter.warnings) == (1, ["another"])


def test_the_same_run_twice_has_the_same_table(world: OptionWorld) -> None:
    again = pipeline.train(world.recipe(ADAPTIVE)).run
    assert read_object(again.sensitivity)["linears"] == read_object(world.train(ADAPTIVE).sensitivity)["linears"]


def test_a_resume_asks_nothing_and_is_the_same_run(world: OptionWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.train(ADAPTIVE)
    before = [line["loss"] for line in step_lines(run)], adapter_tensors(run)
    monkeypatch.setattr(calibration, "measure_changes", never)
    again = pipeline.train(run.root.parent / "recipe.yaml", resume_from=2).run
    assert ([line["loss"] for line in step_lines(again)], adapter_tensors(again)) == before


def test_a_given_plan_brings_its_table(world: OptionWorld, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = world.train(ADAPTIVE)
    monkeypatch.setattr(calibration, "measure_changes", never)
    other = pipeline.train(world.recipe(ADAPTIVE), plan_file=run.plan).run
    assert kinds_of(other) == kinds_of(run)
    foreign = read_object(run.plan)
    foreign["linears"]["model.layers.0.mlp.down_proj"] = "fp4"
    (tmp_path / "plan.json").write_text(json.dumps(foreign), encoding="utf-8")
    with pytest.raises(Exception, match=r"plan\.json: linears: 'fp4' is no valid value"):
        pipeline.train(world.recipe(ADAPTIVE), plan_file=tmp_path / "plan.json")


def test_a_merge_rebuilds_each_kind_and_agrees_with_the_adapter(world: OptionWorld, tmp_path: Path) -> None:
    run = world.train(ADAPTIVE)
    merged = pipeline.merge(run.root, output=tmp_path / "merged")
    assert merged.parity is not None  # compared with the adapter's own answers: else exit 9
    assert merged.report.proven and merged.report.rebuilt_tensors == len(kinds_of(run))


def test_it_is_scored_beside_its_base(world: OptionWorld) -> None:
    assert scores_of(world.evaluate({}, ADAPTIVE))


def test_a_budget_below_what_this_devices_kinds_take_is_told_before_a_load(
    world: OptionWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "load_model", never)
    tight = {**ADAPTIVE, "model.quantization": {"kind": "adaptive", "bits": 5.0}}
    with pytest.raises(RecipeError, match=r"5 bits a weight are less than the \d\.\d+ that the linears take"):
        pipeline.train(world.recipe(tight))


def test_memory_that_runs_out_while_rows_are_asked_is_exit_7(
    world: OptionWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(calibration, "measure_changes", run_out)
    with pytest.raises(ResourceError, match=r"out of memory while the unquantised base said .*card\.json") as caught:
        pipeline.train(world.recipe(ADAPTIVE))
    assert caught.value.exit_code == 7


def test_a_base_that_does_not_fit_unquantised_is_refused_by_the_plan(
    world: OptionWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.train(ADAPTIVE)
    monkeypatch.setattr("lorafit.plan.calibration.fits", lambda *_: False)
    with pytest.raises(
        DoesNotFitError, match=r"takes the unquantised base and a backward pass: .*card\.json"
    ) as caught:
        pipeline.train(world.recipe(ADAPTIVE))
    assert caught.value.exit_code == 10
    pipeline.train(run.root.parent / "recipe.yaml", resume_from=2)  # with a table there is nothing to choose


def test_tasks_whose_loss_takes_other_answers_are_refused_by_validate(world: OptionWorld) -> None:
    with pytest.raises(RecipeError, match="calibration rows need a loss of their own, and that of dpo"):
        pipeline.validate(world.recipe({**ADAPTIVE, "task": "dpo", "evaluation.final": ["loss"]}))


class Ranks:
    """What the choice asks of an accelerator."""

    def __init__(self, kind: str = "cpu", processes: int = 1) -> None:
        self.device, self.num_processes = torch.device(kind), processes


def choose(world: OptionWorld, monkeypatch: pytest.MonkeyPatch, shapes: dict[str, LinearShape], ranks: Ranks) -> Any:
    """The choice where no row says anything."""
    monkeypatch.setattr(calibration, "open_linears", lambda *_: shapes)
    monkeypatch.setattr(calibration, "_ask_rows", lambda *_: {path: {} for path in shapes})
    for name in ("peak_memory_bytes", "release_memory"):
        monkeypatch.setattr(calibration, name, lambda *_: None)
    asked = {**ADAPTIVE, "model.quantization": {"kind": "adaptive", "bits": 9.0}}
    return calibration.choose_linears(world.job(asked), world.plan(asked), ranks, Silent())  # type: ignore[arg-type]


@pytest.mark.parametrize(("device", "kinds"), [("cpu", ["int8", "none"]), ("cuda", ["nf4", "int8", "none"])])
def test_a_cpu_has_no_four_bits_for_rows_that_are_no_whole_blocks(
    device: str, kinds: list[str], world: OptionWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = choose(world, monkeypatch, {"a": LinearShape("a", 96, 96, 1)}, Ranks(device))
    assert list(choice.found[0].changes) == kinds
    assert choice.linears == {"a": "int8" if device == "cpu" else "nf4"}  # of equal ones the cheapest


def test_all_processes_take_what_the_first_one_found(world: OptionWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    def receive(chosen: list[str]) -> None:
        chosen[:] = ["int8"] * len(chosen)

    monkeypatch.setattr(calibration, "broadcast_object_list", receive)
    shapes = {"a": LinearShape("a", 128, 128, 1)}
    assert choose(world, monkeypatch, shapes, Ranks(processes=2)).linears == {"a": "int8"}
    assert choose(world, monkeypatch, shapes, Ranks()).linears == {"a": "nf4"}


def test_a_model_of_which_nothing_can_be_quantised_is_refused(
    world: OptionWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="no linear of this model can be quantised; write none"):
        choose(world, monkeypatch, {}, Ranks())


def test_changes_that_are_no_numbers_end_the_run(world: OptionWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"model.layers.0.mlp.up_proj": {"nf4": float("nan")}}
    monkeypatch.setattr(calibration, "measure_changes", lambda _, __, tried: {path: {} for path in tried} | broken)
    with pytest.raises(NumericsError, match=r"up_proj: the loss of the calibration rows, or its gradient"):
        pipeline.train(world.recipe(ADAPTIVE))
